"""`lora-exp sync`: which offline parts it sends, in which order; W&B's own client finds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_exp.cli import app
from lora_exp.errors import SavedError
from lora_exp.record.standing import ASIDE
from lora_exp.tracking.sync import offline_parts, run_id


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an offline run, by W&B's client."""
    import wandb

    folder = tmp_path_factory.mktemp("written")
    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True)
    run = wandb.init(mode="offline", reinit="create_new", settings=settings, dir=str(folder))
    run.log({"a": 1})
    run.finish()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


@pytest.fixture
def sweep(tmp_path: Path, written: Path) -> Path:
    folder = tmp_path / "day" / "time"

    def add(job: str, name: str, sent: bool = False) -> None:
        part = folder / job / "wandb" / name
        part.mkdir(parents=True)
        path = part / f"run-{name.rpartition('-')[2]}.wandb"
        path.write_bytes(written.read_bytes())
        if sent:
            path.with_name(f"{path.name}.synced").touch()

    add("1", "offline-run-20261101_100000-b2")
    add("0", "offline-run-20261103_090000-a1")  # it was resumed
    add("0", "offline-run-20261101_090000-a1", sent=True)
    add("0.other-content", "offline-run-20261031_090000-z9")
    return folder


def test_parts_of_a_resumed_run_follow_each_other_and_what_was_set_aside_is_left_out(
    sweep: Path,
) -> None:
    parts = offline_parts(sweep, ASIDE)
    assert [(p.parent.parent.name, run_id(p), p.name[12:20]) for p in parts] == [
        ("0", "a1", "20261101"), ("0", "a1", "20261103"), ("1", "b2", "20261101"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Would sync 2 run(s)" in done.stderr  # not the one that was sent


def test_a_dry_run_lists_what_would_be_sent(sweep: Path) -> None:
    result = CliRunner().invoke(app, ["sync", str(sweep), "--dry-run"])
    assert result.exit_code == 0
    states = [line.split("  ")[1:] for line in result.output.splitlines()]
    assert states == [
        ["a1", "offline-run-20261101_090000-a1", "sent before"],
        ["a1", "offline-run-20261103_090000-a1", "to send"],
        ["b2", "offline-run-20261101_100000-b2", "to send"],
    ]


def test_without_a_server_it_says_what_was_not_sent(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["sync", str(sweep / "1")])
    assert result.exit_code == 1
    assert result.output.endswith("NOT SENT\n")


def test_a_folder_without_offline_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(SavedError, match="has no offline W&B runs"):
        offline_parts(tmp_path, ASIDE)
