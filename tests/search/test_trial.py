"""A trial's result, and which trial is the best."""

from __future__ import annotations

import math

import pytest

from lora_exp.search.trial import Trial, best


def test_a_trial_without_a_finite_objective_has_failed() -> None:
    trial = Trial({"a": "1"})
    for state, value in (
        ("complete", math.nan),
        ("pruned", math.inf),
        ("failed", 1.0),
        ("complete", None),
    ):
        ended = trial.ended(state, value, 3)  # type: ignore[arg-type]
        assert (ended.state, ended.value, ended.step) == ("failed", None, 0)
    assert trial.ended("pruned", 2, 3) == Trial({"a": "1"}, "pruned", 2.0, 3)


@pytest.mark.parametrize(("direction", "number"), [("minimize", 1), ("maximize", 3)])
def test_the_best_is_complete_and_the_first_of_equals(direction: str, number: int) -> None:
    values = [(2.0, "complete"), (1.0, "complete"), (1.0, "complete"), (3.0, "complete")]
    values += [(0.0, "pruned"), (9.0, "pruned")]
    trials = [Trial({}, state, value) for value, state in values]  # type: ignore[arg-type]
    assert best([*trials, Trial({}, "failed")], direction) == number
    assert best(trials[4:], direction) is None
