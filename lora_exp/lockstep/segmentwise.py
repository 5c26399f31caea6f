"""A module that mixes the tokens of a row, or is not known: run for each job by itself.

Each job's own module computes, in the job's own shape, with its own mask, cache and adapters; only
products of linear layers at which all jobs arrive are computed together.

Shapes as in `segment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_exp.lockstep.layers import ProductCall, Run
from lora_exp.lockstep.replacement import Replacement
from lora_exp.lockstep.segment import Pass


class SegmentWise(Replacement):
    """Replaces a module of a `FusedBody`."""

    def __init__(self, base: nn.Module, body: Any, name: str) -> None:
        """Replace a module.

        Args:
            base: the module in the fused body; only its linear layers are used.
            body: the `FusedBody`; it is no nn.Module, so it does not become a submodule.
            name: of the module, also in the jobs' own bodies.
        """
        super().__init__(base, body)
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the jobs' own modules side by side, as `Pass.joined` does."""
        p: Pass = self.body.current
        with self.body.known():
            calls = [self._own(p, i, args, kwargs) for i in range(len(p.segments))]
            outputs = outputs_of(self.body, calls)
            if isinstance(outputs[0], tuple):
                return tuple(p.joined(values) for values in zip(*outputs, strict=True))
            return p.joined(outputs)

    def _own(
        self, p: Pass, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any]:
        """Return the call of a job's own module."""
        module = self.body.own_module(p.segments[index].job, self.name)
        positional = [p.own(index, value) for value in args]
        return partial(module, *positional, **p.own_arguments(index, kwargs))


def outputs_of(body: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return what the jobs' calls return; products at which all arrive are shared.

    Args:
        body: the `FusedBody`, in whose current pass each segment has a call.
        calls: of each job's own module or layer.
    """
    if body.runs:  # the calls are parts of the jobs' forwards
        runs = body.runs
        answers = [body.resume(run, i, calls[i]) for i, run in enumerate(runs)]
    else:  # they are recomputed
        runs = tuple(map(Run, calls))
        answers = [body.resume(run, i) for i, run in enumerate(runs)]
    while any(isinstance(answer, ProductCall) for answer in answers):
        products = _products(body, answers)
        answers = [
            body.resume(runs[i], i, products[i]) if isinstance(answer, ProductCall) else answer
            for i, answer in enumerate(answers)
        ]
    return answers


def _products(body: Any, answers: list[Any]) -> list[Tensor | None]:
    """Return the product of each segment's rows; None: its own module is to compute it."""
    p: Pass = body.current
    alone: list[Tensor | None] = [None] * len(answers)
    if not all(isinstance(a, ProductCall) and a.name == answers[0].name for a in answers):
        return alone
    parts: list[Tensor] = [answer.rows for answer in answers]
    for x, s in zip(parts, p.segments, strict=True):
        in_shape = x.shape[:-1] in (s.input_ids_BS.shape, (s.own_tokens,))
        # another kernel may compute the product of rows that do not lie side by side in memory
        if not in_shape or not x.is_contiguous() or x.dtype != parts[0].dtype:
            return alone
    products: list[Tensor | None] = body.linears[answers[0].name].together(parts, p)
    return products
