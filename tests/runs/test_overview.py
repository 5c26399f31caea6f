"""The page of `lora-exp runs`: it fits a terminal, and names from elsewhere do no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from lora_exp.runs.listing import COLUMNS, select
from lora_exp.runs.overview import duration, local_time, overview

Write = Callable[..., Path]


def rename(run: Path, name: str) -> None:
    """Give a run another name in its record."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"name": name}))


def test_a_line_is_whole_in_a_pipe_and_fits_a_terminal(write_run: Write, tmp_path: Path) -> None:
    long = {"data.path": "x" * 90, "peft.r": 4}
    rename(write_run("a", 0.123456, overrides=long), "名前" * 20)
    write_run("b", None)
    page = overview(select([tmp_path]), COLUMNS, None)
    assert all(text in page for text in ("名前" * 20, "x" * 90, "0.1235", "2 runs: 2 finished"))
    directory = str(tmp_path / "a")
    for width in (len(directory) + 60, len(directory) + 120):
        lines = overview(select([tmp_path]), COLUMNS, width).splitlines()
        assert max(cell_len(line) for line in lines[:3]) <= width
        assert lines[1].endswith(directory) or lines[2].endswith(directory)
        assert any("…" in line for line in lines)
    assert "no room for sweep, size, time, steps, date" in overview(select([tmp_path]), COLUMNS, 40)


def test_markup_and_control_characters_in_names_are_only_text(
    write_run: Write, tmp_path: Path
) -> None:
    rename(write_run("a"), "[bold red]x[/] \x1b[31m\n<b>")
    lines = overview(select([tmp_path]), ["name", "directory"], None).splitlines()
    assert lines[1].startswith("[bold red]x[/]  [31m <b>")
    assert len(lines) == 3


def test_damaged_runs_are_named_with_what_is_wrong(write_run: Write, tmp_path: Path) -> None:
    (write_run("a") / "run.json").write_text("{")
    page = overview(select([tmp_path]), COLUMNS, 200)
    assert f"damaged: {tmp_path}/a: run.json cannot be read" in page
    assert page.endswith("1 run: 1 damaged")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5 s"), (65, "1:05"), (3600 * 3 + 12, "3:00:12")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_date_that_is_none_stays_as_it_is() -> None:
    assert local_time("soon") == "soon"
    assert local_time("2026-11-02T12:30:59+00:00").endswith(":30")
