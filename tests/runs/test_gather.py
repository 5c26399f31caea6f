"""Runs below folders: which are listed, in which order, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_exp.errors import SavedError
from lora_exp.runs.gather import find_runs, read_runs

Write = Callable[..., Path]


def names(folders: list[Path], below: Path) -> list[str]:
    return [str(run.directory.relative_to(below)) for run in find_runs(folders)]


def test_runs_are_listed_once_and_by_number(write_run: Write, tmp_path: Path) -> None:
    for name in (
        "sweep/10",
        "sweep/2",
        "alone",
        "sweep/3.not-proven-equal",
        "sweep/4.other-content2",
    ):
        write_run(name)
    write_run("alone/checkpoints/checkpoint-3")
    (tmp_path / "sweep/11/.hydra").mkdir(parents=True)  # refused before it began
    assert names([tmp_path, tmp_path / "sweep", tmp_path / "sweep/2"], tmp_path) == [
        "alone", "sweep/2", "sweep/10",
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    assert names([tmp_path], tmp_path) == ["alone", "sweep/2", "sweep/10"]
    assert names([tmp_path / "link", tmp_path / "sweep"], tmp_path) == ["link/2", "link/10"]


def test_a_damaged_run_is_listed_with_its_problem(write_run: Write, tmp_path: Path) -> None:
    write_run("a")
    (write_run("b") / "run.json").unlink()
    (write_run("c") / "run.json").write_text("{")
    problems = [run.problem for run in find_runs([tmp_path])]
    assert problems[:2] == [None, "run.json is missing"]
    assert "cannot be read" in str(problems[2])


def test_a_path_without_a_run_is_named(write_run: Write, tmp_path: Path) -> None:
    run = write_run("sweep/0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedError, match=r"empty: no run is in it or below it"):
        read_runs([run, tmp_path / "empty"])
    with pytest.raises(SavedError, match=r"swep: there is no such folder \(did you mean sweep\?"):
        read_runs([tmp_path / "swep"])
    with pytest.raises(SavedError, match=r"run\.json is a file; name the folder"):
        read_runs([run / "run.json"])
    assert [r.directory for r in read_runs([str(run.parent)])] == [run]


def test_a_thousand_runs_are_read_in_half_a_second(write_run: Write, tmp_path: Path) -> None:
    first = write_run("sweep/0", overrides={"peft.r": 0})
    record, config = ((first / name).read_text() for name in ("run.json", "config.yaml"))
    for number in range(1, 1000):
        directory = first.with_name(str(number))
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "run.json").write_text(record)
        (directory / "config.yaml").write_text(config.replace("r: 0", f"r: {number}"))
    started = time.process_time()
    runs = find_runs([tmp_path])
    seconds = time.process_time() - started
    assert len(runs) == 1000
    assert seconds < 0.5
    started = time.process_time()
    assert [run.config()["peft.r"] for run in runs] == list(range(1000))
    assert time.process_time() - started < 1
