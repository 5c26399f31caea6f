"""Groups as rows and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_exp.comparison.group import group_of, grouped, row
from lora_exp.comparison.statistics import Difference
from lora_exp.runs.run import read_run

Write = Callable[..., Path]


def test_a_group_is_a_flat_row_and_nested_json(write_run: Write) -> None:
    runs = [
        read_run(write_run(str(s), 0.2 * s, overrides={"seed": s, "train.x": float("inf")}))
        for s in (2, 1)
    ]
    group = group_of(runs, ["train.x", "peft.r", "peft.none"])
    flat = row(group, ["train.x", "peft.r", "peft.none"])
    assert (flat["peft.r"], flat["peft.none"], flat["train.x"]) == ("8", "", "Infinity")
    assert (flat["runs"], flat["seeds"], flat["difference"], flat["rows_low"]) == (2, 2, None, None)
    assert flat["directories"] == f"{runs[1].directory} {runs[0].directory}"
    nested = grouped(group)
    assert json.loads(json.dumps(nested, allow_nan=False)) == nested
    assert [run["seed"] for run in nested["runs"]] == [1, 2]
    assert nested["values"] == {"train.x": None, "peft.r": 8}


def test_runs_of_one_seed_count_once(write_run: Write) -> None:
    values = {"a": (0.2, 1), "b": (0.4, 1), "c": (0.9, 2)}
    runs = [read_run(write_run(n, v, overrides={"seed": s})) for n, (v, s) in values.items()]
    group = group_of(runs, [])
    assert group.seeds == {1: (0.2 + 0.4) / 2, 2: 0.9}
    assert group.mean == sum(group.seeds.values()) / 2


@pytest.mark.parametrize(
    ("objective", "verdict"),
    [("eval/exact_match", "cannot be told apart"), ("eval/loss", "worse")],
)
def test_intervals_that_disagree_decide_nothing(
    write_run: Write, objective: str, verdict: str
) -> None:
    group = group_of([read_run(write_run("a", objective=objective))], [])
    assert group.verdict == ""
    worse = Difference(objective, "maximize", -0.2, (-0.3, -0.1), "3 seeds")
    better = Difference("eval/exact_match", "maximize", 0.2, (0.1, 0.3), "16 rows")
    assert replace(group, difference=worse, rows=better).verdict == verdict
    of_loss = replace(
        better, measure="eval/loss", goal="minimize", mean=-0.2, interval=(-0.3, -0.1)
    )
    other = "worse" if verdict != "worse" else "cannot be told apart"
    assert replace(group, difference=worse, row_losses=of_loss).verdict == other
