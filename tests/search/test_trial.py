"""A trial's result, and which trial is the best."""

from __future__ import annotations

import math

import pytest

from lora_exp.search.trial import Trial, best, front


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


def test_a_complete_trial_has_all_objectives_or_it_has_failed() -> None:
    trial = Trial({"a": "1"})
    both = trial.ended("complete", 1, 0, {"bytes": 2, "eval/kl": 3.0})
    assert both.objectives == [1.0, 2.0, 3.0]
    assert both.losses(["minimize", "maximize", "minimize"]) == [1.0, -2.0, 3.0]
    for lacking in (None, math.nan):
        assert trial.ended("complete", 1, 0, {"bytes": lacking}) == Trial({"a": "1"}, "failed")
    pruned = trial.ended("pruned", 1, 4, {"bytes": 2, "eval/kl": None})
    assert (pruned.value, pruned.step, pruned.others) == (1.0, 4, {"bytes": 2.0})


def test_the_front_is_what_no_trial_dominates() -> None:
    pairs = [(3.0, 1), (1.0, 3), (2.0, 2), (2.0, 3), (1.0, 4), (2.0, 2), (0.0, 9)]
    trials = [Trial({}).ended("complete", x, 0, {"n": y}) for x, y in pairs]
    trials.insert(0, Trial({}).ended("pruned", -1, 5, {"n": 0}))
    trials.append(Trial({}, "failed"))
    assert front(trials, ["minimize", "minimize"]) == [7, 2, 3, 6, 1]
    assert front(trials, ["minimize", "maximize"]) == [7]
    assert front(trials, ["maximize", "maximize"]) == [1, 4, 5, 7]
    assert front([], ["minimize"]) == []
