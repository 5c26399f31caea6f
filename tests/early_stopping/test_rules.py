"""Which jobs and runs stop."""

from __future__ import annotations

import math

import pytest

from lora_exp.early_stopping.rules import Halving, Median, Patience, Threshold


def halving(eta: int = 3) -> Halving:
    return Halving(eta=eta, first_rung=None, keep=False)


@pytest.mark.parametrize(("eta", "jobs", "kept"), [(3, 27, 9), (3, 8, 2), (2, 5, 2), (4, 3, 1)])
def test_halving_keeps_the_best_share_and_at_least_one(eta: int, jobs: int, kept: int) -> None:
    costs = {job: [9.0, float(jobs - job)] for job in range(jobs)}
    assert halving(eta).survivors(costs, {}) == set(range(jobs - kept, jobs))


def test_of_equal_jobs_halving_keeps_the_lower_numbers_and_infinite_ones_last() -> None:
    costs = {5: [1.0], 2: [1.0], 7: [math.inf], 4: [1.0]}
    assert halving(2).survivors(costs, {}) == {2, 4}


def test_the_forecast_of_halving_adds_up() -> None:
    assert halving().forecast(27).endswith("9 after 11% of the steps, 3 after 33% of the steps;"
                                           " 26% of all 27 jobs' steps in all")  # fmt: skip


def test_the_median_counts_stopped_jobs_with_their_last_costs() -> None:
    rule = Median(n_startup_trials=3, first_rung=0.5, interval=0.5, keep=False)
    live = {0: [3.0], 1: [1.0], 2: [2.0]}
    assert rule.survivors(live, {}) == {1, 2}
    assert rule.survivors(live, {8: [9.0], 9: [9.0]}) == {0, 1, 2}
    assert rule.survivors({0: [1.0, 5.0], 1: [6.0, 6.0], 2: [2.0, 2.0]}, {}) == {0, 2}


def test_the_median_stops_none_of_a_few() -> None:
    rule = Median(n_startup_trials=4, first_rung=0.5, interval=0.5, keep=False)
    assert rule.survivors({0: [3.0], 1: [1.0], 2: [2.0]}, {}) == {0, 1, 2}


def test_patience_counts_evaluations_without_enough_improvement() -> None:
    rule = Patience(metric=None, patience=2, min_delta=0.1)
    assert rule.reason([(1, 3.0), (2, 2.0), (3, 1.95)]) is None
    assert rule.reason([(1, 3.0), (2, 2.0), (3, 1.95), (4, 1.0)]) is None
    text = rule.reason([(1, 3.0), (2, 2.0), (3, 1.95), (4, 1.91)])
    assert text == "no improvement of more than 0.1 since step 2"
    assert rule.reason([(1, math.nan), (2, math.nan)]) == (
        "no improvement of more than 0.1 since step 0"
    )


@pytest.mark.parametrize(
    ("step", "value", "text"),
    [
        (9, 5.0, None),
        (10, 5.0, "5 is above upper=4"),
        (10, 0.5, "0.5 is below lower=1"),
        (10, math.nan, "nan is below lower=1"),
        (10, 4.0, None),
    ],
)
def test_a_threshold_bounds_evaluations_after_its_warm_up(
    step: int, value: float, text: str | None
) -> None:
    rule = Threshold(metric=None, lower=1.0, upper=4.0, n_warmup_steps=10, keep=False)
    assert rule.reason(step, value) == text
