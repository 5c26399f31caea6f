"""Rows of runs: their values, which are selected, in which order, and how fast."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_exp.errors import ConfigError, SavedError
from lora_exp.runs.gather import find_runs
from lora_exp.runs.listing import COLUMNS, Row, as_json, rows_of, select
from lora_exp.runs.overview import overview

Write = Callable[..., Path]


def names(rows: list[Row]) -> list[str]:
    return [str(row.value("name")) for row in rows]


def test_the_newest_run_comes_first_and_any_key_sorts(write_run: Write, tmp_path: Path) -> None:
    for name, value, day in (("a", 0.3, 2), ("b", None, 3), ("c", 0.1, 1)):
        write_run(name, value, started=f"2026-11-0{day}T00:00:00+00:00")
    assert names(select([tmp_path])) == ["b", "a", "c"]
    assert names(select([tmp_path], sort="objective")) == ["c", "a", "b"]  # none comes last
    assert names(select([tmp_path], sort="-eval/loss")) == ["a", "c", "b"]


def test_runs_are_selected_by_config_metric_group_and_row(write_run: Write, tmp_path: Path) -> None:
    for name, rank, value in (("a", 8, 0.3), ("b", 16, 0.2), ("c", 32, 0.4)):
        write_run(name, value, overrides={"peft.r": rank})
    write_run("d", status="failed", overrides={"peft.r": 64})
    where = "peft.r>=16 and status=finished"
    assert sorted(names(select([tmp_path], where))) == ["b", "c"]
    assert names(select([tmp_path], f"{where} and eval/loss<0.3")) == ["b"]
    assert len(select([tmp_path], "peft=lora and quant=none and trainable_parameters=1000")) == 4
    assert select([tmp_path], "peft.r>100") == []


def test_an_unknown_key_is_refused_with_near_names(write_run: Write, tmp_path: Path) -> None:
    write_run("a")
    with pytest.raises(ConfigError, match=r"--where: no run has 'peft.rr' \(did you mean peft.r"):
        select([tmp_path], "peft.rr>8 and status=finished")
    with pytest.raises(ConfigError, match=r"--sort: no run has 'objectiv' \(did you mean objecti"):
        select([tmp_path], sort="-objectiv")
    with pytest.raises(ConfigError, match=r"--columns: no run has 'eval/los' \(did you mean eval/"):
        select([tmp_path], "status=none", columns=["eval/los"])


def test_a_row_shows_the_overrides_that_not_all_runs_have(write_run: Write, tmp_path: Path) -> None:
    common = {"train.max_steps": 5}
    write_run("sweep/0", overrides=common | {"peft.r": 2, "tracking": "none"})
    write_run("sweep/1", overrides=common | {"peft.r": 4})
    (tmp_path / "sweep/sweep.json").write_text("[]")
    rows = rows_of(find_runs([tmp_path]))
    assert [row.value("differs") for row in rows] == [{"peft.r": "2"}, {"peft.r": "4"}]
    assert rows[0].value("sweep") == str(tmp_path / "sweep")
    files = [path for path in (tmp_path / "sweep/0").rglob("*") if path.is_file()]
    assert rows[0].value("size") == sum(path.stat().st_size for path in files)


def test_json_has_every_key_and_the_columns_asked_for(write_run: Write, tmp_path: Path) -> None:
    write_run("a", overrides={"peft.r": 3})
    (write_run("b") / "run.json").write_text("[]")
    rows = {row["name"]: row for row in as_json(select([tmp_path]), ["peft.r"])}
    assert set(COLUMNS) | {"judged_by", "goal", "problem", "peft.r"} == set(rows["a"])
    assert (rows["a"]["peft.r"], rows["a"]["problem"]) == (3, None)
    assert (rows["b"]["status"], rows["b"]["objective"]) == ("damaged", None)
    assert "run.json is not the record of a run" in rows["b"]["problem"]


def test_a_killed_run_has_one_word_for_its_status(write_run: Write, tmp_path: Path) -> None:
    write_run("a", status="running", history=[{"step": 7}])
    assert [row.value("status") for row in select([tmp_path], "status=killed")] == ["killed"]


def test_without_folders_outputs_and_multirun_are_read(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedError, match="there is no outputs or multirun here"):
        select(None)
    write_run("outputs/day/a")
    write_run("multirun/day/time/0")
    write_run("elsewhere/b")
    assert len(select(None)) == 2


def test_hundreds_of_runs_are_listed_in_a_moment_without_torch(
    write_run: Write, tmp_path: Path
) -> None:
    for number in range(300):
        write_run(f"sweep/{number}", overrides={"peft.r": number, "seed": number})
    begin = time.process_time()
    assert overview(select([tmp_path]), COLUMNS, None).count("\n") == 301
    assert time.process_time() - begin < 1.5  # 0.2 s where nothing else runs
    code = "import sys, lora_exp.runs.overview, lora_exp.runs.checkpoints as _;"
    code += "assert not {'torch', 'transformers', 'hydra.main'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
