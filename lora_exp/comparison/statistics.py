"""Statistics of differences between two groups of runs; scipy computes the intervals.

Over seeds, with few values: Student's t interval of the mean of paired differences. A bootstrap of
three values would call a quarter of all pairs of equal groups different.
Over held-out rows: the percentile bootstrap of the mean of paired differences (Efron 1979).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lora_exp.runs.run import SavedRun

CONFIDENCE = 0.95
RESAMPLES = 5000
FEWEST_ROWS = 8  # a bootstrap of fewer says little
BATCH = 2**22  # of resampled values held at a time
SAME = "cannot be told apart"
EXACT_MATCH = "eval/exact_match"  # the metric that rows' answers are counted for
Row = tuple[str, str, int]  # prompt, expected answer, and which of several equal ones


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
    why = "fewer than two seeds in common" if several else "one seed"
    mean = differences[0] if seeds else fmean(values.values()) - fmean(baseline.values())
    return Difference(measure, goal, mean, None, why)


def over_rows(values: Mapping[Row, float], baseline: Mapping[Row, float]) -> Difference | None:
    """Compare the exact match of two groups by held-out row.

    A row's value is the mean over a group's seeds, so the interval says how the difference would
    vary with other rows, for the runs as they were trained.

    Args:
        values: from `matches`.
        baseline: from `matches`.

    Returns:
        The difference; None: there is no row in both.
    """
    differences = [value - baseline[row] for row, value in values.items() if row in baseline]
    if not differences:
        return None
    enough = len(differences) >= FEWEST_ROWS
    interval = bootstrap_interval(differences) if enough else None
    over = f"{len(differences)} rows" + ("" if enough else ", too few")
    return Difference(EXACT_MATCH, "maximize", fmean(differences), interval, over)


def matches(runs: Iterable[SavedRun]) -> dict[Row, float]:
    """Return the share of seeds that answer a row exactly, for the rows that all runs answered.

    Of several runs with one seed, the share of those.
    """
    by_seed: dict[int | None, list[dict[Row, bool]]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(_exact(run.samples()))
    every = [exact for same_seed in by_seed.values() for exact in same_seed]
    rows = [row for row in every[0] if all(row in exact for exact in every)] if every else []
    return {
        row: fmean(fmean(exact[row] for exact in same_seed) for same_seed in by_seed.values())
        for row in rows
    }


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean by Student's t; of two values or more."""
    from scipy.special import stdtrit  # quantiles of t; scipy.stats takes a second to import

    mean, width = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    width *= float(stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2))
    return mean - width, mean + width


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean by resampling; equal input gives equal output."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(differences)) == 1:  # nothing varies
        return differences[0], differences[0]
    result = bootstrap(
        (np.asarray(differences),), np.mean, confidence_level=CONFIDENCE, method="percentile",
        n_resamples=RESAMPLES, batch=max(1, BATCH // len(differences)),
        rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = result.confidence_interval
    return float(low), float(high)


def _exact(samples: Iterable[Mapping[str, Any]]) -> dict[Row, bool]:
    """Return whether each answer after training is the expected one, as `eval/exact_match` does."""
    exact: dict[Row, bool] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        expected, after = sample.get("expected"), sample.get("after")
        if isinstance(expected, str) and isinstance(after, str):
            pair = str(sample.get("prompt")), expected
            exact[*pair, seen[pair]] = after.strip() == expected.strip()
            seen[pair] += 1
    return exact
