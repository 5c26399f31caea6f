"""Curves: means and bands of seeds, pruned runs, a range that the start does not squeeze."""

from __future__ import annotations

from typing import Any

from lora_exp.comparison.curves import POINTS, curve, curves, rungs
from lora_exp.comparison.theme import OTHERS
from tests.comparison.series import run, series


def drawn(*groups: Any) -> Any:
    return curves(groups, "eval/loss", "Evaluation", "")


def test_seeds_with_equal_steps_are_a_mean_in_a_band() -> None:
    seeds = run(history=[(1, 2.0), (2, 1.0)]), run(history=[(1, 4.0), (2, 2.0)])
    band, line = drawn(series(*seeds))["data"]
    assert (line["x"], line["y"]) == ([1, 2], [3.0, 1.5])
    assert (band["x"], band["y"]) == ([1, 2, 2, 1], [4.0, 2.0, 1.0, 2.0])


def test_seeds_that_ended_at_different_steps_are_lines_of_their_own() -> None:
    whole = run(history=[(1, 2.0), (2, 1.0)])
    pruned = run(3.0, [(1, 3.0)], "pruned", stopped={"reason": "2 of 2 at step 1"}, name="loser")
    *lines, ends = drawn(series(whole, pruned))["data"]
    assert [line["y"] for line in lines] == [[2.0, 1.0], [3.0]]
    assert (ends["x"], ends["y"], ends["text"]) == ([1], [3.0], ["loser: 2 of 2 at step 1"])


def test_the_model_before_training_does_not_squeeze_the_chart() -> None:
    layout = drawn(series(run(history=[(0, 80.0), (1, 2.0), (2, 1.0)])))["layout"]
    assert layout["yaxis"]["range"][1] < 3
    assert layout["annotations"][0]["text"] == "before training: 80"


def test_a_steep_start_is_cut_but_every_finished_runs_end_is_shown() -> None:
    steep = [(step, 100.0 / step) for step in range(1, 41)]
    worse = [(step, 30 + 100.0 / step) for step in range(1, 41)]
    low, high = drawn(series(run(history=steep)))["layout"]["yaxis"]["range"]
    assert (low < 2.5, high < 50) == (True, True)
    figure = drawn(series(run(history=steep)), series(run(history=worse)))
    assert figure["layout"]["yaxis"]["range"][1] > 32.5
    assert "double click" in drawn(series(run(history=steep)))["layout"]["meta"]["caption"]


def test_a_rising_metric_is_cut_at_its_start_too() -> None:
    rising = [(step, 1 - 1.0 / step) for step in range(1, 41)]
    low, high = drawn(series(run(history=rising)))["layout"]["yaxis"]["range"]
    assert low > 0.5
    assert high > 0.97


def test_the_last_of_two_values_of_a_step_counts_and_broken_lines_are_left_out() -> None:
    made = run(history=[(1, 5.0), (1, 2.0), (2, float("nan"))])
    made.history().append({"eval/loss": 3.0})
    assert curve(made, "eval/loss") == ([1], [2.0])


def test_long_curves_are_averaged_but_keep_the_step_before_training() -> None:
    steps, values = curve(run(history=[(i, float(i)) for i in range(10 * POINTS)]), "eval/loss")
    assert (steps[0], values[0], steps[-1]) == (0, 0.0, 10 * POINTS - 1)
    assert len(steps) <= POINTS + 1
    assert values[1] == 5.5  # of steps 1 to 10


def test_nothing_is_drawn_of_a_metric_that_was_logged_once_or_not_at_all() -> None:
    assert drawn(series(run(history=[(3, 1.0)]))) is None
    assert curves([series(run(history=[(1, 1.0), (2, 1.0)]))], "train/loss", "", "") is None


def test_groups_after_the_colours_are_grey_and_below_the_others() -> None:
    groups = [series(run(history=[(1, float(i)), (2, float(i))])) for i in range(1, 9)]
    data = drawn(*groups)["data"]
    assert data[0]["line"]["color"] == OTHERS
    assert data[-1]["meta"]["group"] == 0


def test_rungs_are_ladders_that_end_hollow_where_a_job_was_stopped() -> None:
    first = {"rung": 0, "step": 2, "steps": 9, "value": 3.0, "rank": 2, "of": 2}
    second = first | {"rung": 1, "step": 4, "value": 1.0, "rank": 1, "of": 1}
    winner = run(rungs=[first | {"value": 2.0, "rank": 1}, second])
    loser = run(3.0, status="pruned", rungs=[first])
    figure = rungs([series(winner), series(loser)], "eval/loss")
    assert figure is not None
    lost, won = figure["data"]
    assert (lost["x"], won["x"], won["y"]) == ([0], [0, 1], [2.0, 1.0])
    assert lost["marker"]["color"] == ["#ffffff"]
    assert won["marker"]["color"] == ["#0072b2", "#0072b2"]
    assert figure["layout"]["xaxis"]["ticktext"] == ["step 2", "step 4"]
    assert rungs([series(run())], "eval/loss") is None
