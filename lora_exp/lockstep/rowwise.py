"""A layer that computes each row by itself, run once for several jobs if their bits stay equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.lockstep.classes import LayerSignature
from lora_exp.lockstep.products import Group
from lora_exp.lockstep.replacement import Replacement
from lora_exp.lockstep.segment import Pass, PassContext, split


class Unmeasured(Exception):
    """A layer would compute several jobs' rows together, but that was not measured to be exact."""


class Rowwise(Replacement):
    """Replaces a norm or activation of a `FusedBody`; `FusedLinear` also adds adapters.

    The pass decides whether the layer computes the rows of all jobs at once, in groups, or each
    job's by themselves.
    """

    def __init__(self, base: nn.Module, body: Any, index: int, divisible: bool = True) -> None:
        """Replace a layer.

        Args:
            base: the layer.
            body: the `FusedBody`; it is no nn.Module, so it does not become a submodule.
            index: this layer's in `Pass.layer_groups`.
            divisible: whether rows may be computed in groups. Not those of a norm: its input is
                also used by the residual connection, and if it were cut in pieces, the gradients
                would be added in another order.
        """
        super().__init__(base, body)
        self.index, self.divisible = index, divisible
        self.signatures: dict[PassContext, LayerSignature] = {}  # of its latest rows, by context

    def forward(self, x_1NC: Tensor) -> Tensor:
        """Return the layer's output, [1, N, ...].

        Raises:
            Unmeasured: see `products`.
        """
        flat = self.is_flat(x_1NC)
        with self.body.known():
            parts = self.products(x_1NC[None] if flat else x_1NC, self.body.current, flat)
            output = parts if isinstance(parts, Tensor) else torch.cat(parts, 1)
            return output[0] if flat else output

    def is_flat(self, x: Tensor) -> bool:
        """Return whether rows come as [N, C]."""
        return x.dim() == 2 and x.shape[0] == sum(self.body.current.sizes)

    def products(self, x_1NC: Tensor, p: Pass, flat: bool = False) -> Tensor | list[Tensor]:
        """Return the layer's output of all rows, in one piece or in pieces of `Pass.sizes`.

        Args:
            x_1NC: the rows.
            p: the pass.
            flat: whether a job alone computes [B S, C], not [B, S, C].

        Raises:
            Unmeasured: the shape does not show which rows are which job's, or the rows of several
                jobs have another dtype than was measured.
        """
        rows = sum(p.sizes)
        heads_first = x_1NC.dim() == 4 and x_1NC.shape[1] != rows == x_1NC.shape[2]
        if x_1NC.dim() < 3 or not (heads_first or x_1NC.shape[:2] == (1, rows)):
            if not p.is_alone:
                raise Unmeasured(f"{type(self.base).__name__} is given {list(x_1NC.shape)}")
            output: Tensor = self.base(x_1NC)
            return output
        shape = x_1NC.shape[1:2] + x_1NC.shape[3:] if heads_first else x_1NC.shape[2:]
        groups = self.groups(tuple(shape), x_1NC.dtype, p, heads_first)
        undivided = not self.divisible or heads_first
        if undivided or groups[0].is_whole_pass(p.segments, rows) or self.body.mode == "bmm":
            output = self.base(x_1NC)
            return output
        return self._grouped(x_1NC, p, groups, flat)

    def groups(
        self, shape: tuple[int, ...], dtype: torch.dtype, p: Pass, heads_first: bool = False
    ) -> tuple[Group, ...]:
        """Return which segments of a pass share a product, and note the shape of a row.

        Raises:
            Unmeasured: rows that may not be divided have another dtype than was measured.
        """
        context: PassContext = self.body.context
        if context not in self.signatures or self.signatures[context].dtype != dtype:
            self.signatures[context] = LayerSignature.of(
                self.base, shape, dtype, context, heads_first
            )
        layer_groups = p.layer_groups[self.index] if p.layer_groups is not None else None
        if layer_groups is not None and layer_groups.dtype == dtype:
            return layer_groups.groups
        if self.body.mode == "bmm":
            return (Group(tuple(range(len(p.segments))), sum(p.sizes)),)
        undivided = not self.divisible or heads_first
        if undivided and not p.is_alone:
            raise Unmeasured(f"{type(self.base).__name__} is given {dtype}")
        return tuple(Group((i,), s.own_tokens, own_shape=True) for i, s in enumerate(p.segments))

    def _grouped(
        self, x_1NC: Tensor, p: Pass, groups: tuple[Group, ...], flat: bool
    ) -> list[Tensor]:
        parts = split(x_1NC, p.sizes)
        out = parts[:]
        for g in groups:
            if g.own_shape:
                (i,) = g.members
                s = p.segments[i]
                y = self.base(s.rows(parts[i][0] if flat else parts[i]))
                own = y.view(*s.input_ids_BS.shape, *y.shape[1:]) if flat else y
                out[i] = s.flat(own)[None]
                continue
            inputs = [parts[i] for i in g.members]
            filling = g.rows - sum(p.sizes[i] for i in g.members)
            if filling:
                inputs.append(x_1NC.new_zeros(1, filling, *x_1NC.shape[2:]))
            y = self.base(torch.cat(inputs, 1))
            for i, part in zip(g.members, split(y, [t.shape[1] for t in inputs]), strict=False):
                out[i] = part
        if p.filling:
            out[-1] = out[0].new_zeros(1, p.filling, *out[0].shape[2:])
        return out
