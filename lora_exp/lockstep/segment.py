"""What a job asks of a pass: its rows, and the mode to compute them in.

Shapes: N tokens of all jobs; B rows, S tokens a row of one job; H heads, D head size; C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_exp.lockstep.state import Precision, RandomState


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
    mask: Any = None  # as the job's attention takes it: the pass makes it

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
        return x_1NC.view(*self.input_ids_BS.shape, -1)
