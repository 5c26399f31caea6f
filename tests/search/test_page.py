"""What a search prints."""

from __future__ import annotations

import pytest

from lora_exp.search.cells import Cells
from lora_exp.search.limits import Size
from lora_exp.search.page import print_batch, print_plan, print_result, print_start
from lora_exp.search.trial import Trial
from tests.search.spaces import presence_of, settings_of, space_of


def test_the_plan_has_the_space_the_batches_and_the_most_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = space_of("a=1,2", "b=tag(log,int(interval(4,64)))")
    first = [Trial({"a": "1", "b": str(n)}) for n in range(10)]
    cells = Cells(settings_of(batch=10), presence_of(space), None)
    print_plan(cells, 32, first, {"max_steps": 7})
    text = " ".join(capsys.readouterr().out.split())
    assert "a 1, 2 b 4 to 64, whole numbers, logarithmic" in text
    assert "32 by tpe, 10 at a time" in text
    assert "at most 32 x 7 = 224 steps" in text
    assert "trial 7 a=1 b=7 ... 2 more in the first batch" in text
    print_plan(cells, 3, first[:1], {"max_steps": -1, "num_train_epochs": 2})
    assert "3 jobs of 2 epochs" in capsys.readouterr().out


def test_the_result_has_the_best_trial_and_its_command_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = [Trial({"a": "1"}).ended("complete", 2), Trial({"a": "x y"}).ended("complete", 1)]
    trials += [Trial({}, "failed"), Trial({"a": "3"}).ended("pruned", 0, 4)]
    print_result(trials, settings_of(), "eval/loss", ["data.path=" + "long/" * 60])
    text = capsys.readouterr().out
    assert "trial 1 of 4, 1 pruned, 1 failed; eval/loss 1" in text
    command = "lora-exp run data.path=" + "long/" * 60 + " 'a=x y'"
    assert command in text.splitlines()
    print_batch(range(4, 6), 8, trials, ["minimize"])
    assert "trials 4 to 5 of 8; best so far: trial 1, 1" in capsys.readouterr().out


def test_the_plan_has_sizes_and_what_the_limits_leave_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    objectives = {"eval/loss": "minimize", "parameters": "minimize"}
    settings = settings_of(max_parameters=2000, sampler="grid", objectives=objectives)
    presence = presence_of(space_of("a=1,2,3"))
    cells = Cells(settings, presence, lambda v: Size(1000 * int(v["a"]), 2**31))
    print_plan(cells, 2, cells.propose((), ()), {})
    text = " ".join(capsys.readouterr().out.split())
    assert "trial 1 a=2: 2,000 trainable parameters, about 2.00 GiB" in text
    assert "limits max_parameters=2000: 1 of 3 cells are left out" in text
    assert "objectives eval/loss (minimize), parameters (minimize)" in text
    print_start(2, cells)
    assert "search: 2 trials; max_parameters=2000: 1 of 3 cells" in capsys.readouterr().out
    print_start(2, Cells(settings_of(sampler="grid"), presence, None))
    assert not capsys.readouterr().out


def test_the_result_of_several_objectives_is_their_front(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [(2.0, 1000), (1.0, 3000), (3.0, 2000)]
    trials = [Trial({"a": str(n)}).ended("complete", x, 0, {"parameters": y})
              for n, (x, y) in enumerate(pairs)]  # fmt: skip
    trials.append(Trial({"a": "3"}).ended("pruned", 0.1, 4, {"parameters": 1}))
    objectives = {"eval/loss": "minimize", "parameters": "minimize"}
    settings = settings_of(objectives=objectives)
    print_result(trials, settings, "eval/loss", ["seed=1"])
    text = capsys.readouterr().out
    assert "Pareto front, 2 of 4 trials, 1 pruned" in text
    cells = [[word for word in line.split("│") if word.strip()] for line in text.splitlines()]
    rows = [[word.strip() for word in row] for row in cells if len(row) == 4]
    assert rows == [["1", "1", "3,000", "a=1"], ["0", "2", "1,000", "a=0"]]
    commands = [line for line in text.splitlines() if line.startswith("lora-exp run")]
    assert commands == ["lora-exp run seed=1 a=1", "lora-exp run seed=1 a=0"]
    print_batch([4], 8, trials, settings.directions)
    assert "trial 4 of 8; Pareto front so far: 1, 0" in capsys.readouterr().out
