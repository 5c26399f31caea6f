"""Routing replay: one model's tokens go to the experts that another model chose for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CHOICES = {aten.topk.default, aten.max.dim, aten.argmax.default}
COMPARISONS = {
    getattr(getattr(aten, name), kind) for name in ("gt", "ge", "lt", "le")
    for kind in ("Tensor", "Scalar")
}  # fmt: skip


class Routing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a forward pass decides by comparing floats, or replays recorded decisions.

    Routers of mixtures choose the experts with the largest scores (and Phi's leave out those below
    a threshold), indexers of sparse attention choose positions. The smallest change may swap two
    that are nearly equal, and the logits then jump. With another model's decisions replayed, the
    logits depend continuously on the weights; the scores of what was chosen are the model's own.
    """

    def __init__(self, replayed: Sequence[Tensor] | None = None) -> None:
        """Record decisions.

        Args:
            replayed: the `decisions` of another model on the same tokens, taken instead of the
                model's own; one of another shape is not.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: list[Tensor] = []  # as taken: indices, or the results of comparisons
        self.chosen = 0  # replayed indices
        self.same = 0  # of these, those that the model would have chosen, too
        self._replayed: Iterator[Tensor] = iter(replayed or ())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry out an operation; of a decision, return the replayed one."""
        output = function(*args, **(kwargs or {}))
        is_choice = function in CHOICES
        if not (is_choice or function in COMPARISONS) or not args[0].is_floating_point():
            return output
        own = output[1] if isinstance(output, tuple) else output
        other = next(self._replayed, None)
        if other is None or other.shape != own.shape:
            self.decisions.append(own)
            return output
        self.decisions.append(other)
        if not is_choice:
            return other
        self.chosen += own.numel()
        if function is not aten.topk.default:
            self.same += int((own == other).sum())
            return other if own is output else (_values(args[0], other, *args[1:]), other)
        dim = args[2] if len(args) > 2 else -1
        is_chosen = torch.zeros_like(args[0], dtype=torch.bool).scatter(dim, other, True)
        self.same += int(is_chosen.gather(dim, own).sum())
        return args[0].gather(dim, other), other


def _values(scores: Tensor, indices: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return the scores at the indices that `max` returned along a dimension."""
    if keepdim:
        return scores.gather(dim, indices)
    return scores.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
