"""The options of `early_stopping`. Needs no torch.

`Halving` and `Median` compare the jobs of a sweep at rungs, which are shares of the training steps;
`Patience` and `Threshold` look at the evaluations of one run. Costs are metrics of which lower is
better: those to maximise are negated, and NaN counts as infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Costs = Mapping[int, Sequence[float]]  # job number -> its cost at each rung up to now
Evaluations = Sequence[tuple[int, float]]  # step and cost, in their order
ALMOST_ONE = 1 - 1e-9


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Of n jobs at a rung, the best n // eta go on, at least one.

    Successive halving (arXiv 1502.07943) with synchronous rungs: nothing is decided before every
    job has been measured.

    Attributes:
        eta: the factor between two rungs, and between the numbers of jobs.
        first_rung: a share of the training steps; None: 1 / eta squared.
        keep: save the adapters of stopped jobs, and a checkpoint.
    """

    eta: int
    first_rung: float | None
    keep: bool

    def shares(self) -> list[float]:
        """Return the shares of the training steps at which jobs are compared."""
        shares = [self.first_rung or self.eta**-2]
        while (share := shares[-1] * self.eta) < ALMOST_ONE:
            shares.append(share)
        return shares

    def survivors(self, live: Costs, others: Costs) -> set[int]:
        """Return the jobs that go on; ties: the lower number first.

        Args:
            live: the jobs that are compared, with their costs up to this rung.
            others: those that were stopped earlier, or were not measured here.
        """
        return set(ranked(live)[: max(1, len(live) // self.eta)])

    def forecast(self, jobs: int) -> str:
        """Return how many of a number of jobs go on at each rung, and how many steps that saves."""
        live, before, cost, parts = jobs, 0.0, 0.0, []
        for share in self.shares():
            cost += live * (share - before)
            live, before = max(1, live // self.eta), share
            parts.append(f"{live} after {share:.0%} of the steps")
        total = (cost + live * (1 - before)) / jobs
        return f"early stopping: {', '.join(parts)}; {total:.0%} of all {jobs} jobs' steps in all"


@dataclass(frozen=True, kw_only=True)
class Median:
    """A job goes on while its best cost is not above the median of the latest costs of all jobs.

    As Vizier's and Optuna's median rules, but synchronous: the median is over the jobs that are
    compared at this rung, and over the last costs of those that were stopped at earlier rungs.

    Attributes:
        n_startup_trials: with fewer jobs, none is stopped.
        first_rung: a share of the training steps.
        interval: the share between two rungs.
        keep: save the adapters of stopped jobs, and a checkpoint.
    """

    n_startup_trials: int
    first_rung: float
    interval: float
    keep: bool

    def shares(self) -> list[float]:
        """Return the shares of the training steps at which jobs are compared."""
        count = int((ALMOST_ONE - self.first_rung) / self.interval) + 1
        return [self.first_rung + i * self.interval for i in range(count)]

    def survivors(self, live: Costs, others: Costs) -> set[int]:
        """Return the jobs that go on; see `Halving.survivors`."""
        latest = [costs[-1] for costs in (*live.values(), *others.values()) if costs]
        if len(latest) < self.n_startup_trials:
            return set(live)
        middle = median(latest)
        return {job for job, costs in live.items() if min(costs) <= middle}

    def forecast(self, jobs: int) -> str:
        """Return when jobs are compared: how many go on depends on their values."""
        shares = ", ".join(f"{share:.0%}" for share in self.shares())
        return f"early stopping: {jobs} jobs are compared after {shares} of the steps"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """A run ends when `patience` evaluations in a row have not improved its best by `min_delta`.

    It is finished then: its weights are saved as `keep` says. As transformers'
    EarlyStoppingCallback, whose `early_stopping_threshold` is `min_delta` here.

    Attributes:
        metric: None: the objective.
        patience: a number of evaluations.
        min_delta: the least improvement that counts.
    """

    metric: str | None
    patience: int
    min_delta: float

    def reason(self, evaluations: Evaluations) -> str | None:
        """Return why a run stops after its latest evaluation; None: it goes on."""
        best_step, best, since = 0, float("inf"), 0
        for step, cost in evaluations:
            if cost < best - self.min_delta:
                best_step, best, since = step, cost, 0
            else:
                since += 1
        if since < self.patience:
            return None
        least = f" of more than {self.min_delta:g}" if self.min_delta else ""
        return f"no improvement{least} since step {best_step}"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A run is stopped by an evaluation outside the bounds, as by Optuna's ThresholdPruner.

    Attributes:
        metric: None: the objective.
        lower: None: no bound.
        upper: None: no bound.
        n_warmup_steps: earlier evaluations do not count.
        keep: save the adapter of a stopped run, and a checkpoint.
    """

    metric: str | None
    lower: float | None
    upper: float | None
    n_warmup_steps: int
    keep: bool

    def reason(self, step: int, value: float) -> str | None:
        """Return why a run stops at an evaluation; None: it goes on."""
        if step < self.n_warmup_steps:
            return None
        if self.lower is not None and not value >= self.lower:
            return f"{value:.4g} is below lower={self.lower:g}"
        if self.upper is not None and not value <= self.upper:
            return f"{value:.4g} is above upper={self.upper:g}"
        return None


Comparing = Halving | Median  # the rules that compare jobs
Rule = Comparing | Patience | Threshold


def ranked(costs: Costs) -> list[int]:
    """Return job numbers, the lowest latest cost first; ties: the lower number first."""
    return sorted(costs, key=lambda job: (costs[job][-1], job))
