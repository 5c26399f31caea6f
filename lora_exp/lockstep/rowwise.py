"""A layer that works on each row by itself, run once for several jobs where their bits allow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.lockstep.classes import Kind
from lora_exp.lockstep.grouping import Group
from lora_exp.lockstep.segment import Mode, Pass, split


class Unmeasured(Exception):
    """A layer would compute several jobs' rows together, without a measurement that it may."""


class Rowwise(nn.Module):
    """Stands in for a layer of a `FusedBody`: a norm, an activation; `FusedLinear` adds adapters.

    The layer computes the rows of all jobs at once, in groups, or each job's alone, as the pass
    says.
    """

    def __init__(self, base: nn.Module, body: Any, place: int, divisible: bool = True) -> None:
        """Stand in for a layer.

        Args:
            base: the layer.
            body: the `FusedBody`, no nn.Module, so not ours.
            place: this layer's in `Pass.sharing`.
            divisible: whether rows may be computed in groups. Not those of a norm: its input also
                goes on beside it, and cut in pieces its gradients would be added in another order.
        """
        super().__init__()
        self.base = base
        self.body, self.place, self.divisible = body, place, divisible
        self.kinds: dict[Mode, Kind] = {}  # for the rows that it was given last in each mode

    def __getattr__(self, name: str) -> Any:
        """Look like the layer to those who read its settings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x_1NC: Tensor) -> Tensor:
        """Return what the layer makes of each row, [1, N, ...].

        Raises:
            Unmeasured: see `products`.
        """
        parts = self.products(x_1NC, self.body.current)
        return parts if isinstance(parts, Tensor) else torch.cat(parts, 1)

    def products(self, x_1NC: Tensor, p: Pass) -> Tensor | list[Tensor]:
        """Return what the layer makes of all rows, in one piece or in those of `Pass.sizes`.

        Raises:
            Unmeasured: several jobs' rows cannot be told apart in them, or come in another dtype
                than was measured.
        """
        rows = sum(p.sizes)
        heads_first = x_1NC.dim() == 4 and x_1NC.shape[1] != rows == x_1NC.shape[2]
        several = len(p.segments) > 1
        if x_1NC.dim() < 3 or not (heads_first or x_1NC.shape[:2] == (1, rows)):
            if several:
                raise Unmeasured(f"{type(self.base).__name__} is given {list(x_1NC.shape)}")
            whole: Tensor = self.base(x_1NC)
            return whole
        mode: Mode = self.body.mode
        if mode not in self.kinds or self.kinds[mode].dtype != x_1NC.dtype:
            _, one, other, *rest = x_1NC.shape
            shape = (one, *rest) if heads_first else (other, *rest)
            self.kinds[mode] = Kind.of(self.base, shape, x_1NC.dtype, mode, heads_first)
        sharing = p.sharing[self.place] if p.sharing is not None else None
        measured = sharing is not None and sharing.dtype == x_1NC.dtype
        undivided = not self.divisible or heads_first
        if several and undivided and not measured and self.body.kind == "exact":
            raise Unmeasured(f"{type(self.base).__name__} is given {x_1NC.dtype}")
        if sharing is None or not measured:
            groups = tuple(Group((i,), s.tokens) for i, s in enumerate(p.segments))
        else:
            groups = sharing.groups
        all_rows = groups[0].of_all(p.segments, rows) or self.body.kind == "bmm"
        if undivided or all_rows:
            whole = self.base(x_1NC)
            return whole
        return self._grouped(x_1NC, p, groups)

    def _grouped(self, x_1NC: Tensor, p: Pass, groups: tuple[Group, ...]) -> list[Tensor]:
        parts = split(x_1NC, p.sizes)
        out = parts[:]
        for g in groups:
            if len(g.members) == 1:
                (i,) = g.members
                s = p.segments[i]
                y = self.base(s.rows(parts[i]))
                out[i] = y.reshape(1, s.tokens, *y.shape[2:])
                continue
            own = [parts[i] for i in g.members]
            rest = g.rows - sum(p.sizes[i] for i in g.members)
            if rest:
                own.append(x_1NC.new_zeros(1, rest, *x_1NC.shape[2:]))
            y = self.base(torch.cat(own, 1))
            for i, made in zip(g.members, split(y, [t.shape[1] for t in own]), strict=False):
                out[i] = made
        if p.filling:
            out[-1] = out[0].new_zeros(1, p.filling, *out[0].shape[2:])
        return out
