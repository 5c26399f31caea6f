"""The objective against each key, and the points that figures share."""

from __future__ import annotations

from lora_exp.comparison.effects import KEYS, by_key
from lora_exp.comparison.points import points
from tests.comparison.series import run, series


def test_each_key_is_a_panel_with_its_runs_and_the_means_of_finished_ones() -> None:
    groups = [
        series(run(1.0), run(2.0), peft__r=4, quant="nf4"),
        series(run(3.0), run(9.0, status="pruned"), peft__r=8, quant="none"),
    ]
    figure = by_key(points(groups), "eval/loss")
    assert figure is not None
    means, runs = figure["data"][:2]
    assert (means["x"], means["y"]) == ([4, 8], [1.5, 3.0])
    assert runs["meta"]["groups"] == [0, 0, 1, 1]
    assert runs["marker"]["color"][3] == "#ffffff"  # hollow
    assert runs["y"][3] < 9  # at the edge
    assert "9" in runs["text"][3]
    titles = [figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "xaxis2")]
    assert sorted(titles) == ["peft.r", "quant"]
    assert "At the edge" in figure["layout"]["meta"]["caption"]


def test_a_key_of_the_most_is_drawn_and_the_rest_counted() -> None:
    groups = [
        series(run(float(i)), **{f"key{k}": i % (k + 2) for k in range(12)}) for i in range(9)
    ]
    figure = by_key(points(groups), "eval/loss")
    assert figure is not None
    assert f"xaxis{KEYS}" in figure["layout"]
    assert f"xaxis{KEYS + 1}" not in figure["layout"]
    assert "3 keys" in figure["layout"]["meta"]["caption"]


def test_nothing_is_drawn_without_keys_or_objectives() -> None:
    assert by_key(points([series(run(), run())]), "eval/loss") is None
    assert by_key(points([series(run(None), peft__r=1)]), "eval/loss") is None
