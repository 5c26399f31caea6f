"""A pass: the rows that several jobs ask for, the mode to compute them in, and what they share.

Shapes: N tokens of all jobs; B rows, S tokens a row of one job; H heads, D head size; C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_exp.lockstep.grouping import Group
from lora_exp.lockstep.state import Precision, RandomState

ALIGNMENT = 64  # bytes; torch's tensors begin at multiples, and kernels differ by it (odd widths)


@dataclass(frozen=True)
class Mode:
    """How a pass computes; only requests of one mode can share one."""

    precision: Precision
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
    mask: Any = None  # as the job's attention takes it: the pass makes it, and the next
    positions: Any = None  # of its tokens, [1 or B, S]

    @cached_property
    def tokens(self) -> int:
        """Return how many tokens the rows have."""
        return self.input_ids_BS.numel()

    def asks(self, other: Segment) -> bool:
        """Say whether the other segment asks for the same."""
        mine, theirs = ((s.input_ids_BS, s.attention_mask, s.position_ids) for s in (self, other))
        return other.past is None and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

    def rows(self, x_1NC: Tensor) -> Tensor:
        """Shape this segment's own tokens as its job's layers know them, [B, S, C]."""
        return aligned(x_1NC).view(*self.input_ids_BS.shape, *x_1NC.shape[2:])

    def flat(self, x_BS: Tensor) -> Tensor:
        """Lay what belongs to this segment's tokens, or to one row for all, side by side, [B S]."""
        b, length = self.input_ids_BS.shape
        return x_BS.expand(b, length, *x_BS.shape[2:]).reshape(b * length, *x_BS.shape[2:])


@dataclass(frozen=True)
class Sharing:
    """How one layer computes a pass."""

    dtype: torch.dtype  # of the rows that this was measured for
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Pass:
    """Segments side by side, and behind them tokens that only fill the pass up."""

    segments: list[Segment]
    filling: int
    sharing: tuple[Sharing | None, ...] | None  # for each layer; None: every job's rows alone

    def products_of(self, place: int) -> set[tuple[int, int]]:
        """Return a segment's own number of rows with that of each product that it is part of."""
        own = self.segments[place].tokens
        distinct = {id(s): s for s in self.sharing or () if s is not None}.values()
        groups = (g for s in distinct for g in s.groups if place in g.members)
        return {(own, g.rows) for g in groups} or {(own, own)}

    @cached_property
    def sizes(self) -> list[int]:
        """Return the tokens of each segment, and last those that fill up, if there are any."""
        return [*(s.tokens for s in self.segments), *([self.filling] if self.filling else [])]


def aligned(x: Tensor) -> Tensor:
    """Return a part of a pass as it would begin in memory if it were a tensor of its own."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def split(x_1NC: Tensor, sizes: list[int], dim: int = 1) -> list[Tensor]:
    """Cut a pass's tokens into its segments' (one node in autograd's graph, not one for each)."""
    return list(torch.split(x_1NC, sizes, dim))
