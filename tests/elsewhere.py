"""A device that is not the CPU, on a machine without a GPU: its tensors compute on the CPU.

What mixes tensors of both devices in one operation fails, as it would on a GPU. torch calls the
device `meta`: of `cuda`, even a fake one, torch without CUDA makes no graph (its process aborts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
# operations that move numbers from one device to the other, or take indices of either
MOVES = {"_to_copy", "copy_", "lift_fresh", "index", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor of the other device, around the one of the CPU that has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        """Wrap a tensor of the CPU."""
        wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=ELSEWHERE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute on the CPU, and refuse tensors of both devices."""
        return compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the numbers: torch copies them to the CPU first."""
        return self.inner.tolist()

    def __repr__(self) -> str:
        """Return the numbers."""
        return f"Elsewhere({self.inner!r})"


class Device(TorchDispatchMode):
    """Makes tensors of the other device where they are asked for."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute, as a tensor of the other device does."""
        return compute(function, args, kwargs or {})


class FromNumbers(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Makes tensors from Python's numbers, which torch would make without them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make it on the CPU, and move it."""
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


@contextmanager
def elsewhere_available() -> Iterator[None]:
    """Let tensors be made on `ELSEWHERE`, with their numbers."""
    with FromNumbers(), Device():  # type: ignore[no-untyped-call]
        yield


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU.

    Raises:
        RuntimeError: it mixes tensors of both devices; numbers without a dimension may be mixed.
    """
    name = function.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if there and here and name not in MOVES:
        raise RuntimeError(f"{name} mixes tensors of two devices")
    asked = kwargs.get("device")
    is_there = torch.device(asked) == ELSEWHERE if asked is not None else bool(there)
    if name == "copy_":
        is_there = isinstance(args[0], Elsewhere)
    inner_args, inner_kwargs = tree_map(
        lambda x: x.inner if isinstance(x, Elsewhere) else x,
        (args, kwargs | ({"device": torch.device("cpu")} if asked is not None else {})),
    )
    result = function(*inner_args, **inner_kwargs)
    if not is_there:
        return result
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped
