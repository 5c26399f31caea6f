"""A pass: the rows of several jobs, how they are computed, and which products they share.

Shapes: N tokens of all jobs; B rows, S tokens a row of one job; H heads, D head size; C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_exp.lockstep.grouping import Group
from lora_exp.lockstep.state import ComputeState, RandomState

ALIGNMENT = (
    64  # bytes: torch allocates tensors at multiples, and kernels may depend on it (odd widths)
)


@dataclass(frozen=True)
class PassContext:
    """How a pass computes; requests share a pass only if these are equal."""

    compute_state: ComputeState
    training: bool
    checkpointing: bool


@dataclass
class Segment:
    """One job's rows in a pass."""

    job: int
    input_ids_BS: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past: Any  # the job's own key-value cache while it generates
    random: RandomState  # the job's stream, from which its dropout draws
    mask: Any = None  # the job's attention mask, made by the pass, as are the positions
    positions: Any = None  # of the tokens, [1 or B, S]

    @cached_property
    def tokens(self) -> int:
        """Return how many tokens the rows have."""
        return self.input_ids_BS.numel()

    def equals_request(self, other: Segment) -> bool:
        """Return whether the other segment has the same inputs, and no cache."""
        ours, theirs = ((s.input_ids_BS, s.attention_mask, s.position_ids) for s in (self, other))
        return other.past is None and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(ours, theirs, strict=True)
        )

    def rows(self, x_1NC: Tensor) -> Tensor:
        """Return this segment's tokens in the shape of its own job, [B, S, C]."""
        return aligned(x_1NC).view(*self.input_ids_BS.shape, *x_1NC.shape[2:])

    def flat(self, x_BS: Tensor) -> Tensor:
        """Return values of this segment's tokens, or of one row for all, side by side, [B S]."""
        b, length = self.input_ids_BS.shape
        return x_BS.expand(b, length, *x_BS.shape[2:]).reshape(b * length, *x_BS.shape[2:])


@dataclass(frozen=True)
class LayerGroups:
    """The products in which one layer computes a pass."""

    dtype: torch.dtype  # of the rows for which this was measured
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Pass:
    """Segments side by side, followed by filling: tokens that only make the pass longer."""

    segments: list[Segment]
    filling: int
    layer_groups: (
        tuple[LayerGroups | None, ...] | None
    )  # by layer; None: each job's rows by themselves

    def products_of(self, index: int) -> set[tuple[int, int]]:
        """Return the pairs (rows of a segment, rows of a product that it is part of)."""
        rows = self.segments[index].tokens
        distinct = {id(s): s for s in self.layer_groups or () if s is not None}.values()
        groups = (g for s in distinct for g in s.groups if index in g.members)
        return {(rows, g.rows) for g in groups} or {(rows, rows)}

    @cached_property
    def sizes(self) -> list[int]:
        """Return the number of tokens of each segment, and last that of the filling, if any."""
        return [*(s.tokens for s in self.segments), *([self.filling] if self.filling else [])]


def aligned(x: Tensor) -> Tensor:
    """Return a part of a pass, aligned in memory like a tensor of its own."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def split(x_1NC: Tensor, sizes: list[int], dim: int = 1) -> list[Tensor]:
    """Cut a pass's tokens into its segments (one node in autograd's graph, not one a segment)."""
    return list(torch.split(x_1NC, sizes, dim))
