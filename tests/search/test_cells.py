"""Cells over a limit are no trials: they are proposed anew, or left out of a grid."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lora_exp.errors import ConfigError
from lora_exp.search.cells import Cells
from lora_exp.search.limits import Size
from lora_exp.search.settings import SAMPLERS
from lora_exp.search.trial import Trial
from tests.search.spaces import presence_of, settings_of, space_of

OPEN = ("rate=interval(0,1)", "r=tag(log,int(interval(4,640)))")
GRID = ("a=1,2,3,4,5", "b=x,y")


def size(values: Mapping[str, str]) -> Size:
    return Size(10 * int(values.get("r") or values["a"]), 100)


def cells_of(*overrides: str, **values: object) -> Cells:
    return Cells(settings_of(**values), presence_of(space_of(*overrides)), size)


def searched(cells: Cells, count: int) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < count and (batch := cells.propose(trials, ())):
        trials += [t.ended("complete", float(t.values["rate"])) for t in batch]
    return trials


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "grid"])
def test_every_trial_meets_the_limit_and_the_same_are_proposed_again(sampler: str) -> None:
    limited = [cells_of(*OPEN, sampler=sampler, max_parameters=150) for _ in range(2)]
    trials = searched(limited[0], 16)
    assert len({t.cell for t in trials}) == 16
    assert all(size(t.values).parameters <= 150 for t in trials)
    assert trials == searched(limited[1], 16)
    free = searched(cells_of(*OPEN, sampler=sampler), 16)
    assert any(size(t.values).parameters > 150 for t in free)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_space_has_the_cells_within_the_limit_and_counts_the_others(sampler: str) -> None:
    cells = cells_of(*GRID, sampler=sampler, max_parameters=30)
    assert (cells.total(), cells.left_out()) == (6, (4, 10))
    trials: list[Trial] = []
    while batch := cells.propose(trials, ()):
        trials += [t.ended("complete", 1.0) for t in batch]
    assert {t.values["a"] for t in trials} == {"1", "2", "3"}
    assert len(trials) == 6


def test_a_space_of_which_nothing_meets_the_limit_is_refused_with_the_least() -> None:
    text = "max_parameters: none of 10 cells meets max_parameters=9; the least: 10 trainable"
    with pytest.raises(ConfigError, match=text):
        cells_of(*GRID, max_parameters=9).total()
    many = ["a=range(1,103)", "b=x,y"]
    with pytest.raises(ConfigError, match="max_parameters: none of 204 cells meets"):
        cells_of(*many, max_parameters=9).total()
    with pytest.raises(ConfigError, match="max_bytes: none of 64 cells meets max_bytes=99"):
        cells_of(*OPEN, max_bytes=99).total()
    assert cells_of(*OPEN, max_bytes=100).total() == 32


def test_a_narrow_part_of_a_space_is_found_by_points_that_fill_it() -> None:
    cells = cells_of("rate=interval(0,1)", "r=int(interval(1,400))", max_parameters=100,
                     sampler="random")  # fmt: skip
    assert cells.total() == 32
    trials = searched(cells, 12)
    assert len({t.cell for t in trials}) == len(trials) >= 3
    assert all(int(t.values["r"]) <= 10 for t in trials)


def test_a_first_guess_keeps_its_keys_and_is_refused_if_it_breaks_the_limit() -> None:
    start = [{"rate": "0.5"}, {"r": "4"}]
    trials = cells_of(*OPEN, max_parameters=50, start=start).propose((), ())
    assert trials[0].values["rate"] == "0.5"
    assert trials[1].values["r"] == "4"
    with pytest.raises(ConfigError, match=r"start: no cell with r=6 meets the limits; leave"):
        cells_of(*OPEN, max_parameters=50, start=[{"r": "6"}]).propose((), ())


def test_sizes_of_a_task_without_a_model_are_refused() -> None:
    for values in ({"max_bytes": 1}, {"max_parameters": 1}):
        with pytest.raises(ConfigError, match="the task has no model"):
            Cells(settings_of(**values), presence_of(space_of(*GRID)), None)
    objectives = {"eval/loss": "minimize", "bytes": "minimize"}
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.objectives: the task has no model"):
        Cells(settings_of(objectives=objectives), presence_of(space_of(*GRID)), None)


def test_cells_are_counted_only_if_they_are_few() -> None:
    assert cells_of("a=range(1,52)", "b=x,y", max_parameters=300).left_out() is None
    assert cells_of(*OPEN, max_parameters=300).left_out() is None
    assert cells_of(*GRID).left_out() is None
    grid = cells_of("a=range(1,52)", "b=x,y", max_parameters=300, sampler="grid")
    assert grid.left_out() == (42, 102)
