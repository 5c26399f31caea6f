"""Parallel coordinates."""

from __future__ import annotations

from lora_exp.comparison.parallel import parallel
from lora_exp.comparison.points import points
from tests.comparison.series import run, series


def test_each_run_is_a_line_through_its_values_to_its_objective() -> None:
    groups = [
        series(run(float(rank + rate)), label=f"{rank}, {rate}", peft__r=rank, rate=rate)
        for rank in (1, 2)
        for rate in (1, 100)
    ]
    figure = parallel(points(groups), "eval/loss", "minimize")
    assert figure is not None
    best = figure["data"][-1]  # on top
    assert best["meta"]["name"] == "1, 1"
    assert best["y"][-1] == 0
    assert best["y"][0] < 0.1
    assert figure["layout"]["xaxis"]["ticktext"][-1] == "<b>eval/loss</b>"
    assert {note["text"] for note in figure["layout"]["annotations"]} >= {"1", "2", "100", "102"}
    highest = parallel(points(groups), "eval/loss", "maximize")
    assert highest is not None
    assert highest["data"][-1]["meta"]["name"] == "2, 100"


def test_one_key_needs_no_coordinates() -> None:
    assert parallel(points([series(run(), run(), run(), a=1)]), "eval/loss", "minimize") is None
