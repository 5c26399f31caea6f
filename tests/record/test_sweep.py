"""Rows of a sweep, for every outcome of a job."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import CONF
from lora_exp.errors import ConfigError
from lora_exp.files.paths import SCRATCH
from lora_exp.files.redaction import REDACTED
from lora_exp.record import sweep
from lora_exp.record.ranking import varied_keys
from lora_exp.record.sweep import (
    SweepTable,
    best_job,
    job_row,
    read_rows,
    refresh_row,
    saved_command,
    write_command,
    write_summary,
)


def test_a_job_that_did_not_start_has_its_error(tmp_path: Path) -> None:
    row = job_row(tmp_path / "3", ["peft.r=8"], SimpleNamespace(_return_value=ValueError("no")))
    assert (row["job"], row["name"], row["status"]) == ("3", "3", "failed")
    assert (row["objective"], row["error"]) == (None, "no")
    assert row["overrides"] == {"peft.r": "8"}


def test_a_refused_job_does_not_show_the_run_in_its_directory(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    record = {"name": "r8", "status": "finished", "error": None, "metrics": {"eval/loss": 1.0}}
    (tmp_path / "3" / "run.json").write_text(json.dumps(record))
    refused = SimpleNamespace(_return_value=ValueError("held"))
    row = job_row(tmp_path / "3", ["peft.r=32"], refused)
    assert (row["name"], row["status"], row["metrics"]) == ("3", "failed", {})
    assert row["error"] == "held"


@pytest.mark.parametrize("text", ["seed: None is no seed", ""])
def test_an_error_like_the_one_in_the_record_is_still_a_failure(tmp_path: Path, text: str) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "run.json").write_text('{"status": "finished", "error": null}')
    row = job_row(tmp_path / "3", ["peft.r=8"], SimpleNamespace(_return_value=ValueError(text)))
    assert row["status"] == "failed"


def test_pruned_jobs_stand_after_finished_ones_the_later_first(tmp_path: Path) -> None:
    ends = {"0": ("pruned", 2, 1.0), "1": ("finished", None, 5.0), "2": ("pruned", 6, 2.0),
            "3": ("finished", None, 4.0), "4": ("pruned", 6, 1.5)}  # fmt: skip
    for name, (status, step, value) in ends.items():
        stopped = {"step": step, "reason": f"at step {step}"} if step else None
        record = {"name": name, "status": status, "stopped": stopped, "error": None}
        record |= {"objective": "eval/loss", "goal": "minimize", "metrics": {"eval/loss": value}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    rows = read_rows(tmp_path)
    assert [row["job"] for row in rows] == ["3", "1", "4", "2", "0"]
    assert best_job(tmp_path) == tmp_path / "3"
    del rows[1]["stopped"]  # as an earlier version wrote it
    write_summary(tmp_path, rows)
    with (tmp_path / "summary.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [line["stopped"] for line in table] == ["", "", "at step 6", "at step 6", "at step 2"]


def test_a_job_that_failed_before_and_is_not_run_again_keeps_its_status(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "run.json").write_text('{"status": "diverged", "error": "loss is nan"}')
    error = ValueError("diverged before and not run again (loss is nan)")
    row = job_row(tmp_path / "3", ["peft.r=8"], SimpleNamespace(_return_value=error))
    assert row["status"] == "diverged"


def test_the_summary_has_a_column_for_every_metric_of_any_job(tmp_path: Path) -> None:
    done = SimpleNamespace(_return_value=0.5)
    for name, metrics in (("0", {"a": 1.0}), ("1", {"b": 2.0})):
        (tmp_path / name).mkdir()
        text = json.dumps({"name": name, "status": "finished", "metrics": metrics, "error": None})
        (tmp_path / name / "run.json").write_text(text)
    rows = [job_row(tmp_path / n, [f"peft.r={n}", "seed=1"], done) for n in ("0", "1")]
    assert varied_keys(rows) == ["peft.r"]
    write_summary(tmp_path, rows)
    with (tmp_path / "summary.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [(r["a"], r["b"]) for r in table] == [("1.0", ""), ("", "2.0")]
    assert [r["peft.r"] for r in table] == ["0", "1"]
    header = (tmp_path / "summary.csv").read_text().splitlines()[0].split(",")
    assert len(header) == len(set(header))


def test_a_sweeps_command_is_saved_without_arguments_of_one_launch(tmp_path: Path) -> None:
    folder = tmp_path / "it's, here"
    folder.mkdir()

    def hydra(*task: str, config_name: str = "config", main: str = str(CONF)) -> DictConfig:
        sources = [{"provider": "main", "path": main}, {"provider": "command-line", "path": "my"}]
        overrides = {"hydra": ["hydra.mode=MULTIRUN", "hydra.sweep.dir=x"], "task": list(task)}
        runtime, job = {"config_sources": sources}, {"config_name": config_name}
        return OmegaConf.create({"runtime": runtime, "job": job, "overrides": overrides})

    write_command(folder, hydra("peft.r=2,4", "retry_failed=true"), keep=True)
    write_command(folder, hydra("peft.r=8,9"), keep=True)
    command = ["-m", "--config-dir", "my", "peft.r=2,4"]
    assert saved_command(folder) == [*command, f"hydra.sweep.dir='{tmp_path}/it\\'s, here'"]
    write_command(folder, hydra("peft.r=8,9"), keep=False)
    assert "peft.r=8,9" in saved_command(folder)
    write_command(folder, hydra("peft.r=8,9", config_name="mine"), keep=False)
    assert saved_command(folder)[3:6] == ["--config-name", "mine", "peft.r=8,9"]
    write_command(folder, hydra("peft.r=8,9", main="/other/conf"), keep=False)
    assert saved_command(folder)[1:3] == ["--config-path", "/other/conf"]
    write_command(folder, hydra("+train.hub_token=canary"), keep=False)
    with pytest.raises(ConfigError, match="launched with a secret; give its command again"):
        saved_command(folder)


def finished_job(folder: Path, name: str, objective: float) -> Path:
    job = folder / name
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(f"- peft.r={name}\n- seed=1\n")
    record = {
        "name": name, "status": "finished", "error": None, "objective": "eval/loss",
        "goal": "minimize", "metrics": {"eval/loss": objective},
    }  # fmt: skip
    (job / "run.json").write_text(json.dumps(record))
    return job


def test_the_table_can_be_read_from_directories_with_the_best_first(tmp_path: Path) -> None:
    finished_job(tmp_path, "4", 2.0), finished_job(tmp_path, "8", 1.0)
    rows = read_rows(tmp_path)
    assert [r["job"] for r in rows] == ["8", "4"]
    assert rows[0]["overrides"] == {"peft.r": "8", "seed": "1"}
    assert best_job(tmp_path) == tmp_path / "8"
    assert best_job(tmp_path / "8") is None


@pytest.mark.parametrize("why", ["not-proven-equal", "other-content", "other-content2"])
def test_a_directory_that_is_set_aside_is_no_job_of_the_sweep(tmp_path: Path, why: str) -> None:
    finished_job(tmp_path, "4", 2.0), finished_job(tmp_path, f"4.{why}", 1.0)
    assert [r["job"] for r in read_rows(tmp_path)] == ["4"]
    assert best_job(tmp_path) == tmp_path / "4"
    table = SweepTable()
    table.folder, table.uses_other_launcher = tmp_path, True
    table.read_jobs()
    assert [r["job"] for r in table.rows] == ["4"]


def test_an_error_of_several_jobs_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = SweepTable()
    table.folder, rows = tmp_path, []
    for name, error in (("0", "no such folder"), ("1", "no rank"), ("2", "no such folder")):
        result = SimpleNamespace(_return_value=ConfigError([("model.path", error)]))
        rows.append(job_row(tmp_path / name, [f"peft.r={name}"], result))
    table.rows = rows
    table.print_table()
    printed = capsys.readouterr().out
    assert "jobs 0, 2: model.path: no such folder\njob 1: model.path: no rank\n" in printed


def test_a_table_names_its_folder_unless_it_will_be_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "sweep", tmp_path / f"{SCRATCH}x"):
        table = SweepTable()
        table.folder = folder
        result = SimpleNamespace(_return_value=1.0)
        table.rows = [job_row(folder / "0", ["seed=1"], result)]
        table.print_table()
        printed = capsys.readouterr().out
        assert "objective" in printed
        assert (str(folder) in printed) == (folder.name == "sweep")


def ended(table: SweepTable, folder: Path, *numbers: int) -> None:
    """Tell a table that jobs have ended, of which none has a record."""
    for number in numbers:
        values = {"sweep": {"dir": str(folder)}, "overrides": {"task": [f"seed={number}"]}}
        values["runtime"] = {"output_dir": str(folder / str(number))}
        result = SimpleNamespace(_return_value=1.0)
        table.on_job_end(OmegaConf.create({"hydra": values}), result)


def test_the_summaries_of_a_large_sweep_take_a_time_linear_in_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(sweep, "write_summary", lambda folder, rows: written.append(len(rows)))
    table = SweepTable()
    monkeypatch.setattr(SweepTable, "current", table)
    table.folder = tmp_path
    ended(table, tmp_path, *range(100))
    assert written == list(range(1, 101))  # a small one is written after every job
    totals = []
    for numbers in (range(100, 500), range(500, 1000)):
        ended(table, tmp_path, *numbers)
        totals.append(sum(written))
    assert totals[1] < 2.3 * totals[0]
    table.on_launch_end()
    assert written[-1] == len(table.rows)


@pytest.mark.parametrize("begins", [True, False])
def test_a_launch_leaves_no_secret_and_a_refused_one_the_earlier_multirun_file(
    tmp_path: Path, begins: bool
) -> None:
    multirun, other = tmp_path / "multirun.yaml", tmp_path / "mine.yaml"
    multirun.write_text("peft.r: 2\n")
    other.write_text("password: mine\n")
    launcher = {"_target_": "hydra_plugins.lockstep_launcher.launcher.LockstepLauncher"}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "launcher": launcher}})
    table = SweepTable()
    table.on_multirun_start(config)
    multirun.write_text("password: canary\n")  # as Hydra does
    if begins:
        table.on_job_start(config)
    table.on_launch_end()
    assert multirun.read_text() == (f"password: {REDACTED}\n" if begins else "peft.r: 2\n")
    assert other.read_text() == "password: mine\n"


@pytest.mark.parametrize("text", ['{"accuracy": 1}', '[{"accuracy": 1}]', "[1]", "no JSON"])
def test_a_summary_of_another_tool_beside_a_run_is_left_alone(tmp_path: Path, text: str) -> None:
    finished_job(tmp_path, "run1", 2.0)
    (tmp_path / "summary.json").write_text(text)
    refresh_row(tmp_path / "run1")
    assert (tmp_path / "summary.json").read_text() == text


def test_a_job_that_was_resumed_alone_keeps_its_place(tmp_path: Path) -> None:
    finished_job(tmp_path, "4", 2.0), finished_job(tmp_path, "8", 1.0)
    write_summary(tmp_path, read_rows(tmp_path))
    record = json.loads((tmp_path / "4/run.json").read_text())
    record["metrics"]["eval/loss"] = 0.5
    (tmp_path / "4/run.json").write_text(json.dumps(record))
    refresh_row(tmp_path / "4")
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["job"], r["objective"]) for r in rows] == [("4", 0.5), ("8", 1.0)]
    refresh_row(tmp_path / "4" / "none")
