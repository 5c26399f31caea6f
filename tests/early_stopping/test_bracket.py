"""A verdict needs every report, and depends on nothing else."""

from __future__ import annotations

import math
import random

import pytest

from lora_exp.early_stopping.bracket import Bracket, Verdict
from lora_exp.early_stopping.rules import Halving, Median


def bracket(jobs: int, maximize: bool = False, eta: int = 2) -> Bracket:
    rule = Halving(eta=eta, first_rung=None, keep=False)
    return Bracket(rule, maximize, frozenset(range(jobs)))


def test_no_job_is_judged_before_all_have_reported() -> None:
    jobs = bracket(3)
    jobs.report(0, 0, 1.0)
    jobs.report(2, 0, 3.0)
    assert jobs.verdict(0, 0) is None
    jobs.report(1, 0, 2.0)
    assert jobs.verdict(0, 0) == Verdict(True, 1, 3)
    assert jobs.verdict(2, 0) == Verdict(False, 3, 3)
    assert jobs.stopped() == {1, 2}


@pytest.mark.parametrize("maximize", [False, True])
def test_the_goal_decides_what_is_best_and_nan_is_worst(maximize: bool) -> None:
    jobs = bracket(4, maximize)
    for job, value in enumerate([1.0, math.nan, 3.0, 2.0]):
        jobs.report(job, 0, value)
    best = 2 if maximize else 0
    assert jobs.verdict(best, 0) == Verdict(True, 1, 4)
    assert jobs.verdict(1, 0) == Verdict(False, 4, 4)


def test_a_failed_job_is_worse_than_all_others_and_keeps_its_place_in_the_count() -> None:
    jobs = bracket(4)
    for job in (0, 1, 2):
        jobs.report(job, 0, float(job))
    assert jobs.verdict(0, 0) is None
    jobs.end(3, failed=True)
    assert [jobs.verdict(job, 0).survives for job in (0, 1, 2)] == [True, True, False]  # type: ignore[union-attr]


def test_a_finished_job_without_a_report_is_not_compared() -> None:
    jobs = bracket(3)
    jobs.end(0, failed=False)
    jobs.report(1, 0, 5.0)
    jobs.report(2, 0, 4.0)
    assert jobs.verdict(2, 0) == Verdict(True, 1, 2)
    assert jobs.verdict(1, 0) == Verdict(False, 2, 2)
    assert jobs.stopped() == {1}


def test_a_job_past_a_rung_goes_on_unjudged() -> None:
    jobs = bracket(3)
    jobs.report(0, 0, None)
    jobs.report(1, 0, 5.0)
    jobs.report(2, 0, 4.0)
    assert jobs.verdict(0, 0) == Verdict(True, 0, 2)


def test_verdicts_do_not_depend_on_the_order_of_the_reports() -> None:
    draw = random.Random(3)
    values = {(job, rung): draw.choice([0.0, 1.0, 2.0, math.nan])
              for job in range(9) for rung in range(3)}  # fmt: skip
    outcomes = []
    for seed in range(5):
        jobs = Bracket(
            Median(n_startup_trials=1, first_rung=0.2, interval=0.2, keep=False),
            False,
            frozenset(range(9)),
        )
        order = list(values)
        random.Random(seed).shuffle(order)
        for job, rung in order:
            jobs.report(job, rung, values[job, rung])
        outcomes.append([jobs.verdict(job, rung) for job in range(9) for rung in range(3)])
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_jobs_of_an_earlier_launch_are_compared_and_wait_for_none() -> None:
    jobs = bracket(6)
    for job, value in enumerate([1.0, 4.0, 5.0]):  # 1 and 2 were stopped there
        jobs.report(job, 0, value)
        jobs.end(job, failed=False)
    jobs.report(0, 1, 0.5)
    for job, value in enumerate([2.0, 3.0, 6.0], 3):
        jobs.report(job, 0, value)
    assert [jobs.verdict(job, 0) for job in (3, 4, 5)] == [
        Verdict(True, 2, 6), Verdict(True, 3, 6), Verdict(False, 6, 6),
    ]  # fmt: skip
    jobs.report(3, 1, 1.0)
    jobs.report(4, 1, 0.1)
    assert jobs.verdict(4, 1) == Verdict(True, 1, 3)
    assert jobs.verdict(3, 1) == Verdict(False, 3, 3)
