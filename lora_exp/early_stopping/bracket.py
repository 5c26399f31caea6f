"""A bracket: jobs of a sweep that are compared with each other, and what each has reported.

A verdict depends on the reported values and the job numbers only: not on time, on the number of
jobs that train at once, or on interruptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lora_exp.early_stopping.rules import Comparing, ranked


@dataclass(frozen=True)
class Verdict:
    """How a job compared with the others at a rung."""

    survives: bool
    rank: int  # 1: the best
    of: int  # jobs that were compared


def _nobody(job: int, rung: int, value: float | None) -> None:
    """Tell nobody."""


@dataclass
class Bracket:
    """The reports of jobs with the same rule and objective."""

    rule: Comparing
    maximize: bool
    jobs: frozenset[int]
    # job -> rung -> value; None: the job was past the rung when rungs were introduced
    values: dict[int, dict[int, float | None]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)  # or diverged
    # is told the reports of this process's jobs
    listener: Callable[[int, int, float | None], None] = field(
        default=_nobody, compare=False, repr=False
    )
    # rung -> the jobs that reach it; waiting jobs ask for it again and again
    _live: dict[int, set[int] | None] = field(default_factory=dict, compare=False, repr=False)

    def report(self, job: int, rung: int, value: float | None) -> None:
        """Take a job's value at a rung; None: it was not measured there, and is not compared."""
        self.note(job, rung, value)
        self.listener(job, rung, value)

    def note(self, job: int, rung: int, value: float | None) -> None:
        """Take the value of a job that trains in another process."""
        self.values.setdefault(job, {})[rung] = value
        self._live.clear()

    def end(self, job: int, failed: bool) -> None:
        """Note that a job will report no more; one that failed is worse than all others."""
        (self.failed if failed else self.finished).add(job)
        self._live.clear()

    def verdict(self, job: int, rung: int) -> Verdict | None:
        """Return how a job compared at a rung; None: some jobs have not reported yet."""
        live = self.live(rung)
        if live is None or (survivors := self.live(rung + 1)) is None:
            return None
        order = ranked(self._compared(live, rung))
        if job not in order:
            return Verdict(job in survivors, 0, len(order))
        return Verdict(job in survivors, order.index(job) + 1, len(order))

    def stopped(self) -> set[int]:
        """Return the jobs that are out, as far as all reports are there."""
        rung, live = 0, set(self.jobs)
        while any(rung in values for values in self.values.values()):
            following = self.live(rung + 1)
            if following is None:
                break
            rung, live = rung + 1, following
        return set(self.jobs) - live

    def live(self, rung: int) -> set[int] | None:
        """Return the jobs that reach a rung; None: not known yet."""
        if rung not in self._live:
            self._live[rung] = self._reaching(rung)
        return self._live[rung]

    def _reaching(self, rung: int) -> set[int] | None:
        if rung == 0:
            return set(self.jobs)
        before = self.live(rung - 1)
        if before is None or not all(self._is_known(job, rung - 1) for job in before):
            return None
        compared = self._compared(before, rung - 1)
        if not compared:
            return before
        others = {job: self._costs(job, rung - 1) for job in self.jobs - compared.keys()}
        return self.rule.survivors(compared, others) | (before - compared.keys())

    def _is_known(self, job: int, rung: int) -> bool:
        ended = job in self.finished or job in self.failed
        return ended or rung in self.values.get(job, {})

    def _compared(self, live: Iterable[int], rung: int) -> dict[int, list[float]]:
        """Return the costs, up to a rung, of the jobs that were measured there or have failed."""
        costs = {}
        for job in live:
            reported = self.values.get(job, {})
            if reported.get(rung) is not None:
                costs[job] = self._costs(job, rung)
            elif rung not in reported and job in self.failed:
                costs[job] = [*self._costs(job, rung), math.inf]
        return costs

    def _costs(self, job: int, rung: int) -> list[float]:
        """Return a job's costs at the rungs up to one."""
        reported = sorted(self.values.get(job, {}).items())
        values = [value for r, value in reported if r <= rung and value is not None]
        return [math.inf if math.isnan(v) else -v if self.maximize else v for v in values]
