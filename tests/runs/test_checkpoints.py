"""Checkpoints are deleted of runs that have ended, after it was said what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_exp import cli
from lora_exp.files.lock import Lock
from lora_exp.runs.checkpoints import delete, plan_deletions
from lora_exp.runs.gather import find_runs

Write = Callable[..., Path]


@pytest.fixture
def write_trained(write_run: Write) -> Write:
    """Write a run with a checkpoint of 1000 bytes and an adapter."""

    def write(name: str, adapter: bool = True, **record: Any) -> Path:
        directory = write_run(name, **record)
        checkpoint = directory / "checkpoints/checkpoint-3"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"x" * 1000)
        if adapter:
            (directory / "adapter").mkdir()
        return directory

    return write


def invoke(*arguments: str, answer: str = "") -> Any:
    return CliRunner().invoke(cli.app, ["runs", *arguments], input=answer)


def test_only_runs_that_have_ended_lose_them_and_only_after_a_yes(
    write_trained: Write, tmp_path: Path
) -> None:
    done, cut = write_trained("done"), write_trained("cut", status="interrupted")
    for answer in ("n\n", "\n"):
        result = invoke(str(tmp_path), "--delete-checkpoints", answer=answer)
        assert "nothing was deleted" in result.stdout
        assert (done / "checkpoints").is_dir()
    assert f"{done}/checkpoints  1.0 KiB; it cannot be trained further" in result.stdout
    assert "cut/checkpoints  stays: interrupted, it could still be resumed" in result.stdout
    assert "checkpoints of 1 run, 1.0 KiB (1,000 bytes)" in result.stdout
    assert invoke(str(tmp_path), "--delete-checkpoints", answer="y\n").exit_code == 0
    assert not (done / "checkpoints").exists()
    assert (done / "adapter").is_dir()
    assert (cut / "checkpoints").is_dir()


def test_those_of_an_unfinished_run_are_deleted_if_asked_by_name(
    write_trained: Write, tmp_path: Path
) -> None:
    cut = write_trained("cut", status="failed")
    result = invoke(str(tmp_path), "--delete-checkpoints", "--unfinished", "--yes")
    assert "failed: it cannot be resumed afterwards, and its weights are lost" in result.stdout
    assert not (cut / "checkpoints").exists()


def test_a_run_in_use_and_a_damaged_one_keep_theirs(write_trained: Write, tmp_path: Path) -> None:
    used, damaged = write_trained("used"), write_trained("damaged")
    (damaged / "run.json").write_text("{")
    planned = plan_deletions(find_runs([tmp_path]), unfinished=True)
    assert [d.run.directory for d in planned.deletions] == [used]
    lock = Lock(used, "test")
    try:
        assert delete(planned)[0] == 0  # it was resumed after the question
        again = plan_deletions(find_runs([tmp_path]), unfinished=True)
    finally:
        lock.release()
    assert not again.deletions
    assert {run.directory: why for run, why in again.kept}[used] == "the run is in use"
    assert all((run / "checkpoints").is_dir() for run in (used, damaged))


@pytest.mark.parametrize(
    ("record", "adapter", "expected"),
    [
        ({"best": {"step": 3, "checkpoint": "x"}, "saved_step": 10}, True, "evaluation, step 3"),
        ({"status": "pruned"}, False, "its weights are lost"),
    ],
)
def test_it_is_said_which_weights_are_lost(
    write_trained: Write, tmp_path: Path, record: dict[str, Any], adapter: bool, expected: str
) -> None:
    write_trained("a", adapter, **record)
    assert expected in plan_deletions(find_runs([tmp_path]), False).text()


def test_a_linked_folder_is_not_followed(write_trained: Write, tmp_path: Path) -> None:
    run = write_trained("a")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert not plan_deletions(find_runs([tmp_path]), False).deletions


def test_deletion_options_go_with_deletion(write_trained: Write, tmp_path: Path) -> None:
    write_trained("a")
    assert invoke(str(tmp_path), "--yes").exit_code == 2
    assert invoke(str(tmp_path), "--delete-checkpoints", "--json").exit_code == 2
    listed = json.loads(invoke(str(tmp_path), "--json").stdout)
    assert [row["name"] for row in listed] == ["a"]
