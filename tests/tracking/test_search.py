"""A search's own W&B run, read from its real offline files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_exp.search.trial import Trial
from lora_exp.tracking.search import TARGET, report_search
from tests.tracking.test_wandb import read_records

TRIALS = [
    Trial({"peft.r": "4"}, "complete", 2.0),
    Trial({"peft.r": "8"}, "pruned", 3.0, 4),
    Trial({"peft.r": "2"}, "failed"),
    Trial({"peft.r": "6"}, "complete", 1.5),
]
CONFIG = {"tracking": {"_target_": TARGET, "mode": "offline"}, "sweep_name": "ranks"}


def test_trials_their_states_rungs_and_the_best_so_far_are_logged_in_the_sweeps_group(
    tmp_path: Path,
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "run.json").write_text(json.dumps({"rungs": [{"rung": 0}, {"rung": 1}]}))
    report_search(CONFIG, tmp_path, TRIALS, range(4), maximize=False)
    records = read_records(tmp_path)
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["run_group"], run["job_type"], run["project"]) == ("ranks", "search", "lora-exp")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["search/state"] for item in history] == [
        "complete",
        "pruned",
        "failed",
        "complete",
    ]
    assert [item["search/best"] for item in history] == [2.0, 2.0, 2.0, 1.5]
    assert [item.get("search/rung") for item in history] == [None, 1, None, None]
    assert history[3]["search/complete"] == 2
    report_search(CONFIG, tmp_path, TRIALS, range(3, 4), maximize=False)
    parts = {path.name[-8:] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(parts) == 1  # the same run goes on


def test_a_search_without_wandb_logs_nothing(tmp_path: Path) -> None:
    report_search({"tracking": None}, tmp_path, TRIALS, range(4), maximize=False)
    report_search({}, tmp_path, TRIALS, range(4), maximize=False)
    assert not list(tmp_path.iterdir())


def test_a_failure_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").write_text("")  # no folder
    report_search(CONFIG, tmp_path, TRIALS, range(4), maximize=False)
    assert "W&B gets nothing of these trials" in caplog.text
