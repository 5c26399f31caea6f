"""Statistics of differences between two groups of runs.

Over seeds, with few values: Student's t interval of the mean of paired differences. A bootstrap of
three values would call a quarter of all pairs of equal groups different.
Over held-out rows: the percentile bootstrap of the mean of paired differences (Efron 1979).
The tests hold both against scipy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lora_exp.runs.run import SavedRun

CONFIDENCE = 0.95
RESAMPLES = 5000
FEWEST_ROWS = 8  # a bootstrap of fewer says little
BATCH = 2**22  # of resampled values held at a time
APART = "fewer than two seeds in common"
SAME = "cannot be told apart"
EXACT_MATCH = "eval/exact_match"  # the metric that rows' answers are counted for
PREFERENCE = "eval/preference_accuracy"  # the metric that pairs are counted for
Outcomes = Mapping[Hashable, bool]  # by row: what it is, and which of several equal ones


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences to a baseline, with its 95% interval.

    Attributes:
        measure: the metric's name.
        goal: `minimize` or `maximize`.
        mean: this group's value minus the baseline's.
        interval: None if there is too little to compute one.
        over: what the pairs are: `3 seeds`, `16 rows`, or why there is no interval.
    """

    measure: str
    goal: str
    mean: float
    interval: tuple[float, float] | None
    over: str

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `cannot be told apart`: no interval, or it contains 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return SAME
        return "better" if (self.mean > 0) == (self.goal == "maximize") else "worse"


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean, and the standard deviation of a sample; None where too few are known."""
    mean = fmean(values) if values else None
    return mean, stdev(values) if len(values) > 1 else None


def over_seeds(
    values: Mapping[Any, float], baseline: Mapping[Any, float], measure: str, goal: str
) -> Difference:
    """Compare the values of two groups by seed, as pairs where both have a seed.

    Args:
        values: by seed.
        baseline: by seed, not empty.
        measure: the metric's name.
        goal: `minimize` or `maximize`.
    """
    seeds = [seed for seed in values if seed in baseline]
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if len(seeds) > 1:
        over, varies = f"{len(seeds)} seeds", len(set(differences)) > 1
        interval = t_interval(differences) if varies else None
        over += "" if varies else " with one difference"  # of a coarse metric: no spread to go by
        return Difference(measure, goal, fmean(differences), interval, over)
    several = len(values) > 1 or len(baseline) > 1
    why = APART if several else "one seed"
    mean = differences[0] if seeds else fmean(values.values()) - fmean(baseline.values())
    return Difference(measure, goal, mean, None, why)


def over_rows(
    values: Mapping[Hashable, float], baseline: Mapping[Hashable, float], measure: str
) -> Difference | None:
    """Compare a share of two groups by held-out row.

    A row's value is the mean over a group's seeds, so the interval says how the difference would
    vary with other rows, for the runs as they were trained.

    Args:
        values: from `matches` or `preferences`.
        baseline: the same of the other group.
        measure: the metric whose mean they have.

    Returns:
        The difference; None: there is no row in both.
    """
    differences = [value - baseline[row] for row, value in values.items() if row in baseline]
    if not differences:
        return None
    enough = len(differences) >= FEWEST_ROWS
    interval = bootstrap_interval(differences) if enough else None
    over = f"{len(differences)} rows" + ("" if enough else ", too few")
    mean = round(fmean(differences), 12) + 0.0  # of thirds that cancel no -5.6e-19 is left, nor -0
    return Difference(measure, "maximize", mean, interval, over)


def matches(runs: Iterable[SavedRun]) -> dict[Hashable, float]:
    """Return the share of seeds that answer a row exactly, for the rows that all runs answered.

    Of several runs with one seed, the share of those.
    """
    return _shares([(run.seed, _exact(run.samples())) for run in runs])


def preferences(runs: Iterable[SavedRun]) -> dict[Hashable, float]:
    """Return the share of seeds that prefer a pair's chosen answer, as `matches` does."""
    return _shares([(run.seed, run.preferences()) for run in runs])


def _shares(outcomes: Iterable[tuple[int | None, Mapping[Any, bool]]]) -> dict[Hashable, float]:
    by_seed: dict[int | None, list[Outcomes]] = {}
    for seed, outcome in outcomes:
        by_seed.setdefault(seed, []).append(outcome)
    every = [outcome for same_seed in by_seed.values() for outcome in same_seed]
    rows = [row for row in every[0] if all(row in outcome for outcome in every)] if every else []
    return {
        row: fmean(fmean(outcome[row] for outcome in same) for same in by_seed.values())
        for row in rows
    }


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean by Student's t; of two values or more."""
    from scipy.special import stdtrit  # quantiles of t; scipy.stats takes a second to import

    mean, width = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    width *= float(stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2))
    return mean - width, mean + width


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean by resampling; equal input gives equal output.

    The numbers are those of `scipy.stats.bootstrap`, which takes a second to import.
    """
    import numpy as np

    if len(set(differences)) == 1:  # nothing varies
        return differences[0], differences[0]
    values, generator = np.asarray(differences), np.random.default_rng(0)
    batch = max(1, BATCH // len(values))
    sizes = (min(batch, RESAMPLES - start) for start in range(0, RESAMPLES, batch))
    samples = (values[generator.integers(len(values), size=(size, len(values)))] for size in sizes)
    means = np.concatenate([sample.mean(axis=1) for sample in samples])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _exact(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], bool]:
    """Return whether each answer after training is the expected one, as `eval/exact_match` does."""
    exact: dict[tuple[str, str, int], bool] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        expected, after = sample.get("expected"), sample.get("after")
        if isinstance(expected, str) and isinstance(after, str):
            pair = str(sample.get("prompt")), expected
            exact[*pair, seen[pair]] = after.strip() == expected.strip()
            seen[pair] += 1
    return exact
