"""Routing replay: one model's tokens go to the experts that another model chose for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_exp.errors import AdapterError

aten = torch.ops.aten
CHOICES = {aten.topk.default, aten.max.dim, aten.argmax.default}
COMPARISONS = {
    getattr(getattr(aten, name), kind) for name in ("gt", "ge", "lt", "le")
    for kind in ("Tensor", "Scalar")
}  # fmt: skip
Decision = tuple[Any, Tensor]  # the operation, and its indices or the result of its comparison


class Routing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a forward pass decides by comparing floats, or replays recorded decisions.

    Routers of mixtures choose the experts with the largest scores (and Phi's leave out those below
    a threshold), indexers of sparse attention choose positions. The smallest change may swap two
    that are nearly equal, and the logits then jump. With another model's decisions replayed, the
    logits depend continuously on the weights; the scores of what was chosen are the model's own.
    """

    def __init__(self, replayed: Sequence[Decision] = ()) -> None:
        """Record decisions.

        Args:
            replayed: the `decisions` of another model on the same tokens, which are taken instead
                of the model's own; none: the model's own are.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: list[Decision] = []  # as they were taken
        self.chosen = 0  # replayed indices, of choices that could have been others
        self.same = 0  # of these, those that the model would have chosen, too
        self._replayed = replayed

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry out an operation; of a decision, return the replayed one."""
        output = function(*args, **(kwargs or {}))
        decides = function in CHOICES or function in COMPARISONS
        if not decides or not args[0].is_floating_point():
            return output
        own = output[1] if isinstance(output, tuple) else output
        taken = self._taken(function, own) if self._replayed else own
        self.decisions.append((function, taken.clone()))  # the model may write into its own
        if taken is own:
            return output
        if function in COMPARISONS:
            return taken
        self._count(function, args, own, taken)
        if own is output:
            return taken
        dim = args[2] if len(args) > 2 and function is aten.topk.default else -1
        if function is aten.max.dim:
            return _scores(args[0], taken, *args[1:]), taken
        return args[0].gather(dim, taken), taken

    def _taken(self, function: Any, own: Tensor) -> Tensor:
        """Return a copy of the replayed decision that is the next one.

        Raises:
            AdapterError: the other model has decided something else there.
        """
        number = len(self.decisions)
        if number < len(self._replayed):
            operation, taken = self._replayed[number]
            if operation is function and taken.shape == own.shape:
                return taken.to(own.device, copy=True)
        raise self._lost()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """End the pass.

        Raises:
            AdapterError: the other model has decided more.
        """
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and len(self.decisions) < len(self._replayed):
            raise self._lost()

    def _lost(self) -> AdapterError:
        text = "it decides otherwise on the way to its logits than the adapter on its base"
        number = len(self.decisions) + 1
        return AdapterError(f"the merged model is another one: {text} (decision {number})")

    def _count(self, function: Any, args: Any, own: Tensor, taken: Tensor) -> None:
        """Count the choices that are equal; not those of all there is, or among masked ones."""
        scores = args[0]
        if function is not aten.topk.default:
            self.chosen += own.numel()
            self.same += int((own == taken).sum())
            return
        dim = args[2] if len(args) > 2 else -1
        if own.shape[dim] == scores.shape[dim]:
            return
        among_taken = torch.zeros_like(scores, dtype=torch.bool).scatter(dim, taken, True)
        finite = scores.gather(dim, own).isfinite()
        self.chosen += int(finite.sum())
        self.same += int((among_taken.gather(dim, own) & finite).sum())


def _scores(scores: Tensor, indices: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return the scores at the indices that `max` returned along a dimension."""
    if keepdim:
        return scores.gather(dim, indices)
    return scores.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
