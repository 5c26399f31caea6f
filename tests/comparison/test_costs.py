"""Quality and cost: the Pareto front; metrics of tasks."""

from __future__ import annotations

from lora_exp.comparison.costs import front, tasks, tradeoffs
from lora_exp.comparison.points import points
from tests.comparison.series import run, series


def test_the_front_has_those_that_no_other_beats_in_both() -> None:
    assert front([1, 2, 3, 4], [5.0, 6.0, 3.0, 4.0], "minimize") == [0, 2]
    assert front([1, 2, 3, 4], [5.0, 6.0, 3.0, 4.0], "maximize") == [0, 1]
    assert front([2, 2, 1], [1.0, 1.0, 1.0], "minimize") == [2]


def test_each_cost_that_differs_is_a_panel_of_group_means() -> None:
    small = run(2.0, counts={"trainable_parameters": 10}, metrics={"peak_bytes": 2**30})
    large = run(1.0, counts={"trainable_parameters": 90}, metrics={"peak_bytes": 2**30})
    pruned = run(0.5, status="pruned", counts={"trainable_parameters": 50})
    figure = tradeoffs(
        points([series(small), series(large), series(pruned)]), "eval/loss", "minimize"
    )
    assert figure is not None
    line, means = figure["data"]
    assert (line["x"], line["y"]) == ([10, 90], [2.0, 1.0])  # a pruned run is on no front
    assert means["text"] == ["1", "2", ""]
    assert figure["layout"]["xaxis"]["title"]["text"] == "trainable parameters"
    assert figure["layout"]["xaxis"]["type"] == "log"
    assert tradeoffs(points([series(small)]), "eval/loss", "minimize") is None


def test_tasks_are_rows_with_a_point_for_each_group_and_what_was_before() -> None:
    rates = {"eval/exact_match": 0.5, "eval/exact_match_a": 1.0, "before/exact_match_a": 0.25}
    figure = tasks([series(run(metrics=rates)), series(run(metrics={"eval/exact_match_b": 0.5}))])
    assert figure is not None
    before, second, first = figure["data"]
    assert (before["x"], before["y"]) == ([0.25], ["exact_match_a"])
    assert (first["x"], first["y"]) == ([1.0], ["exact_match_a"])
    assert second["y"] == ["exact_match_b"]
    assert tasks([series(run())]) is None
