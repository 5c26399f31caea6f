"""The report of a sweep that trains: another process writes it, seldom, and never too late."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lockstep_launcher._jobs import Jobs
from lora_exp.comparison import live
from lora_exp.comparison.live import LiveReport
from lora_exp.errors import Paused
from lora_exp.lockstep.plan import Job
from tests.comparison.sweeps import write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two jobs, of which the second still trains."""
    folder = write_sweep(tmp_path / "sweep", ranks=(4,), rates=(1e-3,), seeds=(1, 2), points=8)
    path = folder / "1/run.json"
    record = json.loads(path.read_text()) | {"status": "running", "metrics": {}}
    path.write_text(json.dumps(record))
    return folder


def jobs_of(sweep: Path) -> Jobs:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}, "report": "now.html"})
    context = SimpleNamespace(
        callbacks=SimpleNamespace(on_job_start=lambda **_: None, on_job_end=lambda **_: None)
    )
    launcher = SimpleNamespace(config=config, hydra_context=context, task_function=None)
    state = Jobs(launcher, ours=True)
    state.jobs[0] = Job(0, config, None, sweep / "0")
    return state


def test_a_job_that_ends_has_the_report_written_beside_the_training(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    state = jobs_of(sweep)
    state.ended(0, JobReturn())
    process = state.report._process
    assert process is not None
    state.report.refresh()
    assert state.report._process is process  # one at a time
    assert process.wait(60) == 0
    text = (sweep / "now.html").read_text(encoding="utf-8")
    assert "running" in text
    state.report.refresh()
    assert state.report._process is not process
    state.stopped()
    assert state.report._process.returncode == -9  # so it will not overwrite the last report
    assert (sweep / "now.html").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("value", [0.5, Paused("at a rung")], ids=str)
def test_a_job_that_has_ended_or_paused_keeps_no_config(sweep: Path, value: Any) -> None:
    state, made = jobs_of(sweep), list[DictConfig]()
    config = state.jobs[0].config
    state.jobs[0] = Job(0, lambda: made.append(config) or config, None, sweep / "0")  # type: ignore[func-returns-value]
    state.began(0)
    result = JobReturn()
    result.return_value, result.status = value, JobStatus.COMPLETED
    state.ended(0, result)
    assert made == [config]
    assert state.jobs[0].config is made[1]


def test_a_job_that_is_pruned_at_a_rung_has_the_report_written_at_once(sweep: Path) -> None:
    record = json.loads((sweep / "0/run.json").read_text())
    state = jobs_of(sweep)
    state.report._began -= live.RUNG_S + 1
    for status, is_written in {"finished": False, "pruned": True}.items():
        (sweep / "0/run.json").write_text(json.dumps(record | {"status": status}))
        state.ended(0, JobReturn())
        assert (state.report._process is not None) == is_written
    state.stopped()


def test_a_report_is_written_once_a_minute_at_most(sweep: Path) -> None:
    reports = [LiveReport(sweep, "a.html"), LiveReport(sweep, None)]
    for report in reports:
        report.refresh()
        assert report._process is None  # the sweep has just begun
    reports[0]._began -= live.EVERY_S
    (sweep / "a.html").touch()
    reports[0].refresh()
    assert reports[0]._process is None  # it has just been written
    os.utime(sweep / "a.html", (0, time.time() - live.EVERY_S - 1))
    reports[0].refresh()
    assert reports[0]._process is not None
    for report in reports:
        report.stop()
