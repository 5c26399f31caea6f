"""A pass: the rows of several jobs, how they are computed, and which products they share.

Shapes: N tokens of all jobs; B rows, S tokens a row of one job; H heads, D head size; C channels.
Where a pass leaves out the padding of a job's rows, N has fewer of its tokens than B S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_exp.lockstep.padding import Kept
from lora_exp.lockstep.products import Group
from lora_exp.lockstep.state import ComputeState, RandomState

ALIGNMENT = (
    64  # bytes: torch allocates tensors at multiples, and kernels may depend on it (odd widths)
)

CACHES = ("past_key_values", "cache_params")  # arguments and outputs that are caches


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
    arguments: dict[str, Any]  # of the call of the job's body
    random: RandomState  # the job's stream, from which its dropout draws
    kept: Kept | None = None  # the tokens that the pass has; None: all

    @property
    def input_ids_BS(self) -> Tensor:
        """Return the tokens."""
        ids: Tensor = self.arguments["input_ids"]
        return ids

    @property
    def attention_mask(self) -> Tensor | None:
        """Return which tokens are no padding, those in the cache included."""
        return self.arguments.get("attention_mask")

    @property
    def past(self) -> Any:
        """Return the job's own key-value cache while it generates."""
        caches = (self.arguments.get(name) for name in CACHES)
        return next((cache for cache in caches if cache is not None), None)

    def arguments_with(self, past: Any) -> dict[str, Any]:
        """Return the arguments with another cache in place of the job's own."""
        names = [name for name in CACHES if self.arguments.get(name) is not None]
        return self.arguments | dict.fromkeys(names, past)

    @property
    def tokens(self) -> int:
        """Return how many tokens of the rows the pass has."""
        return self.own_tokens if self.kept is None else len(self.kept.tokens_N)

    @property
    def own_tokens(self) -> int:
        """Return how many tokens the rows have, padding included: those of a run alone."""
        return self.input_ids_BS.numel()

    def leave_out_padding(self) -> None:
        """Let the pass have only the tokens that are no padding; with a cache, all."""
        mask = None if self.past is not None else self.attention_mask
        self.kept = Kept.of(mask, self.input_ids_BS.shape)

    def equals_request(self, other: Segment) -> bool:
        """Return whether the other segment has the same inputs, and no cache."""
        if other.past is not None or self.arguments.keys() != other.arguments.keys():
            return False
        pairs = [(value, other.arguments[key]) for key, value in self.arguments.items()]
        tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
        return (
            all(
                a is b or (type(a) is type(b) and (isinstance(a, Tensor) or a == b))
                for a, b in pairs
            )
            and all(a.shape == b.shape and a.dtype == b.dtype for a, b in tensors)
            # the device is waited for once
            and bool(torch.stack([(a == b).all() for a, b in tensors]).all())
        )

    def rows(self, x_1NC: Tensor) -> Tensor:
        """Return this segment's tokens in the shape of its own job: [B, S, C], or [B S, C].

        Padding that the pass has left out is zero.
        """
        is_flat = x_1NC.dim() == 2
        if self.kept is None:
            x = aligned(x_1NC)
        else:
            x = self.kept.padded(x_1NC if is_flat else x_1NC[0])
        return x if is_flat else x.view(*self.input_ids_BS.shape, *x_1NC.shape[2:])

    def flat(self, x_BS: Tensor) -> Tensor:
        """Return values of this segment's tokens, or of one row for all, side by side, [N]."""
        b, length = self.input_ids_BS.shape
        x_M = x_BS.expand(b, length, *x_BS.shape[2:]).reshape(b * length, *x_BS.shape[2:])
        return x_M if self.kept is None else self.kept.unpadded(x_M)


@dataclass(frozen=True)
class LayerGroups:
    """The products in which one layer computes a pass."""

    dtype: torch.dtype  # of the rows for which this was measured
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class PerSegment:
    """An argument that each segment has its own value of; code that uses it as one fails."""

    values: tuple[Any, ...]

    def __bool__(self) -> bool:
        """Refuse to be one condition for all."""
        raise TypeError("a condition that differs between the jobs of a pass")


class Absent:
    """The value of an argument that a segment's call does not have."""


@dataclass(frozen=True)
class Pass:
    """Segments side by side, followed by filling: tokens that only make the pass longer."""

    segments: list[Segment]
    filling: int
    layer_groups: (
        tuple[LayerGroups | None, ...] | None
    )  # by layer; None: each job's rows by themselves

    @property
    def is_alone(self) -> bool:
        """Return whether it has the rows that one job has alone, and no others."""
        return len(self.segments) == 1 and not self.filling and self.segments[0].kept is None

    def products_of(self, index: int) -> set[tuple[int, int, bool]]:
        """Return the products that a segment is part of.

        Returns:
            The rows of the segment in a run alone, those of the product, and whether padding was
            left out.
        """
        s = self.segments[index]
        rows, leaves_out = s.own_tokens, s.kept is not None
        distinct = {id(s): s for s in self.layer_groups or () if s is not None}.values()
        groups = (g for s in distinct for g in s.groups if index in g.members)
        return {(rows, g.rows, leaves_out) for g in groups} or {(rows, rows, leaves_out)}

    @cached_property
    def most_rows(self) -> int:
        """Return the most rows that one of its layers computes, those of filling included."""
        by_layer = {id(g): g.groups for g in self.layer_groups or () if g is not None}
        return max(sum(g.rows for g in groups) for groups in by_layer.values())

    @cached_property
    def sizes(self) -> list[int]:
        """Return the number of tokens of each segment, and last that of the filling, if any."""
        return [*(s.tokens for s in self.segments), *([self.filling] if self.filling else [])]

    def dim_of_rows(self, x: Any) -> int | None:
        """Return the dimension of the pass's tokens: 1 of [1, N, ...], 0 of [N, C]; else None."""
        rows = sum(self.sizes)
        if not isinstance(x, Tensor):
            return None
        if x.dim() > 2 and x.shape[:2] == (1, rows):
            return 1
        return 0 if x.dim() == 2 and x.shape[0] == rows else None

    def own(self, index: int, value: Any) -> Any:
        """Return a segment's value of an argument: its rows in its own shape, or its own object."""
        if isinstance(value, PerSegment):
            return value.values[index]
        dim = self.dim_of_rows(value)
        if dim is None:
            return value
        return self.segments[index].rows(split(value, self.sizes, dim)[index])

    def own_arguments(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that a segment's call has, with its own values."""
        own = {name: self.own(index, value) for name, value in arguments.items()}
        return {name: value for name, value in own.items() if value is not Absent}

    def joined(self, values: Sequence[Any]) -> Any:
        """Return what is the inverse of `own`, for one value of each segment.

        Returns:
            A value that all have in common as it is, rows side by side, [1, N, C] or [N, C], or
            what each has of its own.
        """
        first = values[0]
        if isinstance(first, bool | int | float | str | None) or first is Absent:
            common = all(type(v) is type(first) and v == first for v in values)
            return first if common else PerSegment(tuple(values))
        if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            return PerSegment(tuple(values))
        if all(v.dim() == 3 and v.shape[:2] == s.input_ids_BS.shape for v, s in self._with(values)):
            return self.side_by_side(values)
        if all(v.dim() == 2 and v.shape[0] == s.own_tokens for v, s in self._with(values)):
            own = [v.view(*s.input_ids_BS.shape, -1) for v, s in self._with(values)]
            return self.side_by_side(own)[0]
        return PerSegment(tuple(values))

    def side_by_side(self, values: Sequence[Tensor]) -> Tensor:
        """Return values of each segment's own tokens, [B, S, ...], as those of the pass."""
        parts = [s.flat(v)[None] for v, s in self._with(values)]
        if self.filling:
            parts.append(parts[0].new_zeros(1, self.filling, *parts[0].shape[2:]))
        return torch.cat(parts, 1)

    def _with(self, values: Sequence[Any]) -> list[tuple[Any, Segment]]:
        return list(zip(values, self.segments, strict=True))


def jobs_that_read_padding(gradients: Iterable[tuple[Segment, Tensor | None]]) -> list[int]:
    """Return the jobs whose hidden states have a gradient at padding that the pass left out.

    Args:
        gradients: of segments' hidden states, [B, S, C]; others are passed over.
    """
    found = [
        (s.job, g.flatten(0, 1)[s.kept.padding].any())
        for s, g in gradients
        if s.kept is not None and g is not None and g.shape[:2] == s.input_ids_BS.shape
    ]
    if not found:
        return []
    flags = torch.stack([flag for _, flag in found]).tolist()  # the device is waited for once
    return [job for (job, _), flag in zip(found, flags, strict=True) if flag]


def aligned(x: Tensor) -> Tensor:
    """Return a part of a pass, aligned in memory like a tensor of its own."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def split(x_1NC: Tensor, sizes: list[int], dim: int = 1) -> list[Tensor]:
    """Cut a pass's tokens into its segments (one node in autograd's graph, not one a segment)."""
    return list(torch.split(x_1NC, sizes, dim))
