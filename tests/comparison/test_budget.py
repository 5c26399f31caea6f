"""Warnings: budgets in one line, others a line each, and none where runs are equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.comparison.budget import warnings
from lora_exp.runs.run import read_run

Write = Callable[..., Path]


def warned(write_run: Write, *records: dict[str, Any]) -> list[str]:
    return warnings([read_run(write_run(str(i), **record)) for i, record in enumerate(records)])


def test_equal_runs_give_no_warning(write_run: Write) -> None:
    tokens = ({"history": [{"step": 1, "train/num_tokens": count}]} for count in (1000, 1040))
    assert warned(write_run, *tokens) == []


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([{}, {}, {"steps": 5}], "steps differ: 10 (2 runs), 5 (1 run)"),
        (
            [{"history": [{"train/num_tokens": n}, {"eval/loss": 1.0}]} for n in (500, 2500)],
            "tokens trained on differ: 500 to 2,500 a run",
        ),
        ([{}, {}, {"goal": "maximize"}], "goals of eval/loss differ: minimize (2 runs), maximize"),
        ([{}, {"data": {"rows.jsonl": "other"}}], "data differ: 2 contents by hash"),
        (
            [{}, {"base": "sha256:22"}],
            "bases differ: sha256:1 (1 run), sha256:22 (1 run), whose losses",
        ),
        ([{}, {"versions": {"torch": "2.14.0"}}], "versions differ: torch 2.13.0, 2.14.0"),
        ([{}, {"objective": "eval/x", "metrics": {"eval/x": 1}}], "different objectives, a table"),
        ([{}, {"lockstep": {"proven": False}}], "not proven equal to their runs alone: 1"),
        ([{}, {"value": 0.75}], "equal config and seed, other values: "),
    ],
)
def test_what_is_unequal_is_one_line(
    write_run: Write, records: list[dict[str, Any]], text: str
) -> None:
    lines = [line for line in warned(write_run, *records) if text in line]
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_unequal_budgets_are_one_line_together(write_run: Write) -> None:
    other = {"steps": 5, "data": {"rows.jsonl": "other"}, "versions": {"torch": "2.14.0"}}
    (line,) = warned(write_run, {}, other)
    assert line.startswith("unequal budgets: steps differ: 10 (1 run), 5 (1 run); data differ: 2 ")
    assert line.endswith("; versions differ: torch 2.13.0, 2.14.0")


def test_runs_that_have_not_finished_are_not_unequal(write_run: Write) -> None:
    assert warned(write_run, {}, {"status": "pruned", "steps": 3}, {"status": "failed"}) == []


def test_many_damaged_runs_are_one_line(write_run: Write, tmp_path: Path) -> None:
    runs = [write_run(str(i)) for i in range(5)]
    for run in runs:
        (run / "run.json").write_text("{")
    (line,) = warnings([read_run(run) for run in runs])
    assert line.startswith(f"damaged, left out: {tmp_path}/0 (run.json cannot be read")
    assert line.endswith(" and 2 more")


def test_records_with_values_of_odd_types_are_no_error(write_run: Write) -> None:
    odd: dict[str, Any] = {
        "steps": [], "data": 3, "base": {}, "versions": [1], "lockstep": "x", "place": None,
    }  # fmt: skip
    assert warned(write_run, odd, odd | {"steps": {"a": 1}, "versions": {"torch": None}})
