"""A trial: the overrides of one job, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import le
from typing import Literal, TypeGuard

State = Literal["asked", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One cell of a search; its values are the texts of overrides."""

    values: Mapping[str, str] = field(default_factory=dict)
    state: State = "asked"
    value: float | None = None  # of the objective; None: no finite one
    step: int = 0  # where a pruned trial was stopped
    others: Mapping[str, float] = field(default_factory=dict)  # values of further objectives

    @property
    def overrides(self) -> list[str]:
        """The values as arguments of a command line."""
        return [f"{key}={text}" for key, text in self.values.items()]

    @property
    def cell(self) -> frozenset[tuple[str, str]]:
        """The values, whatever their order."""
        return frozenset(self.values.items())

    def ended(
        self,
        state: State,
        value: object,
        step: int = 0,
        others: Mapping[str, object] | None = None,
    ) -> Trial:
        """Return the trial with its result.

        Without a finite objective it has failed; if it is complete, of several without any one.
        """
        finite = {name: float(v) for name, v in (others or {}).items() if _is_finite(v)}
        lacks = state == "complete" and finite.keys() != (others or {}).keys()
        if state == "failed" or not _is_finite(value) or lacks:
            return Trial(self.values, "failed")
        return Trial(self.values, state, float(value), step, finite)

    @property
    def objectives(self) -> list[float]:
        """The values of all objectives; none: there is no finite one."""
        return [] if self.value is None else [self.value, *self.others.values()]

    def losses(self, directions: Sequence[str]) -> list[float]:
        """Return a complete trial's values of all objectives, turned so that less is better."""
        pairs = zip(self.objectives, directions, strict=True)
        return [-value if direction == "maximize" else value for value, direction in pairs]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def best(trials: Iterable[Trial], direction: str) -> int | None:
    """Return the number of the best complete trial in the first objective; None: none is."""
    sign = -1 if direction == "maximize" else 1
    ranked = [(sign * t.value, n) for n, t in enumerate(trials)
              if t.state == "complete" and t.value is not None]  # fmt: skip
    return min(ranked)[1] if ranked else None


def front(trials: Sequence[Trial], directions: Sequence[str]) -> list[int]:
    """Return the numbers of the trials on the Pareto front, the best in the first objective first.

    These are the complete trials than which no other is better in one objective and as good in all.
    """
    complete = {n: t.losses(directions) for n, t in enumerate(trials) if t.state == "complete"}
    best_of = [
        number
        for number, own in complete.items()
        if not any(other != own and all(map(le, other, own)) for other in complete.values())
    ]
    return sorted(best_of, key=lambda number: (complete[number], number))
