"""What a search prints."""

from __future__ import annotations

import pytest

from lora_exp.search.page import print_batch, print_plan, print_result
from lora_exp.search.trial import Trial
from tests.search.spaces import settings_of, space_of


def test_the_plan_has_the_space_the_batches_and_the_most_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = space_of("a=1,2", "b=tag(log,int(interval(4,64)))")
    first = [Trial({"a": "1", "b": str(n)}) for n in range(10)]
    print_plan(space, settings_of(batch=10), 32, first, {"max_steps": 7})
    text = " ".join(capsys.readouterr().out.split())
    assert "a 1, 2 b 4 to 64, whole numbers, logarithmic" in text
    assert "32 by tpe, 10 at a time" in text
    assert "at most 32 x 7 = 224 steps" in text
    assert "trial 7 a=1 b=7 ... 2 more in the first batch" in text
    print_plan(space, settings_of(), 3, first[:1], {"max_steps": -1, "num_train_epochs": 2})
    assert "3 jobs of 2 epochs" in capsys.readouterr().out


def test_the_result_has_the_best_trial_and_its_command_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = [Trial({"a": "1"}).ended("complete", 2), Trial({"a": "x y"}).ended("complete", 1)]
    trials += [Trial({}, "failed"), Trial({"a": "3"}).ended("pruned", 0, 4)]
    print_result(trials, "minimize", "eval/loss", ["data.path=" + "long/" * 60])
    text = capsys.readouterr().out
    assert "trial 1 of 4, 1 pruned, 1 failed; eval/loss 1" in text
    command = "lora-exp run data.path=" + "long/" * 60 + " 'a=x y'"
    assert command in text.splitlines()
    print_batch(range(4, 6), 8, trials, "minimize")
    assert "trials 4 to 5 of 8; best so far: trial 1, 1" in capsys.readouterr().out
