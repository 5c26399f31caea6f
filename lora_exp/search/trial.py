"""A trial: the overrides of one job, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["asked", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One cell of a search; its values are the texts of overrides."""

    values: Mapping[str, str] = field(default_factory=dict)
    state: State = "asked"
    value: float | None = None  # of the objective; None: no finite one
    step: int = 0  # where a pruned trial was stopped

    @property
    def overrides(self) -> list[str]:
        """The values as arguments of a command line."""
        return [f"{key}={text}" for key, text in self.values.items()]

    @property
    def cell(self) -> frozenset[tuple[str, str]]:
        """The values, whatever their order."""
        return frozenset(self.values.items())

    def ended(self, state: State, value: object, step: int = 0) -> Trial:
        """Return the trial with its result; without a finite objective it has failed."""
        if state == "failed" or not isinstance(value, int | float) or not math.isfinite(value):
            return Trial(self.values, "failed")
        return Trial(self.values, state, float(value), step)


def best(trials: Iterable[Trial], direction: str) -> int | None:
    """Return the number of the best complete trial; None: none is complete."""
    sign = -1 if direction == "maximize" else 1
    ranked = [(sign * t.value, n) for n, t in enumerate(trials)
              if t.state == "complete" and t.value is not None]  # fmt: skip
    return min(ranked)[1] if ranked else None
