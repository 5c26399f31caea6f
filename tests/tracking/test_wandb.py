"""What W&B gets, read from real offline files, and what it never gets."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose, run
from lora_exp.tracking.wandb import _fitting
from tests.conftest import QUICK, ROOT
from tests.test_experiment import killed


def offline_run(overrides: list[str], directory: Path, sweep: str | None = None) -> Any:
    return run(compose(*QUICK, "train.logging_steps=1", *overrides), directory, sweep)


def read(directory: Path) -> list[dict[str, Any]]:
    """Read the records of the newest offline run with W&B's own reader."""
    path = sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]], Path]:
    directory = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_API_KEY", "canary-environment-1")
        patch.setattr(sys, "argv", ["run.py", "canary-argv-1"])
        result = offline_run(["peft.r=4", "targets=qv"], directory, "day/time")
    return result, read(directory), directory


def test_the_run_reaches_wandb_whole(tracked: Any) -> None:
    result, records, _ = tracked
    (about,) = (record["run"] for record in records if record["type"] == "run")
    assert about["display_name"].startswith("r4-qv")
    assert (about["run_group"], about["job_type"]) == ("day/time", "sft")
    assert {"peft=lora", "targets=qv", "quant=none", "model=tiny"} <= set(about["tags"])
    config = about["config"]["update"]
    assert (config["peft"]["r"], config["peft"]["target_modules"]) == (4, "qv")
    record = json.loads((result.directory / "run.json").read_text())
    assert about["run_id"] == record["tracking_id"]
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert f"adapter-{about['run_id']}" in {artifact["name"] for artifact in artifacts}


def test_every_metric_has_its_step(tracked: Any) -> None:
    result, records, _ = tracked
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    losses = {item["_step"]: item["train/loss"] for item in history if "train/loss" in item}
    assert list(losses) == [1, 2, 3]
    assert losses[3] == result.metrics["train/loss"]
    assert history[0]["_step"] == 0  # the base, before training
    assert history[0]["eval/loss"] == result.metrics["before/loss"]


def test_the_summary_has_counts_times_and_memory(tracked: Any) -> None:
    result, records, _ = tracked
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert summary["trainable_parameters"] == 12_288
    wanted = {"before/exact_match", "eval/exact_match", "train/seconds", "peak_bytes", "seconds"}
    assert wanted <= set(summary)
    assert summary["eval/loss"] == result.metrics["eval/loss"]


def test_nothing_is_sent_that_was_not_asked_for(tracked: Any) -> None:
    _, _, directory = tracked
    forbidden = ["canary-environment-1", "canary-argv-1", str(ROOT)]
    forbidden += ["def job(", *([host] if len(host := socket.gethostname()) > 4 else [])]
    for path in (directory / "wandb").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found = [word for word in forbidden if word.encode() in data]
            assert not found, f"{path}: {found}"
    assert getpass.getuser()  # the user's name may be a common word, so only metadata is checked
    names = {path.name for path in directory.rglob("*")}
    assert not {"wandb-metadata.json", "requirements.txt", "output.log"} & names


def test_the_samples_are_a_table_of_before_and_after(tracked: Any) -> None:
    _, _, directory = tracked
    (path,) = directory.rglob("samples_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["prompt", "expected", "before", "after"]
    assert len(table["data"]) == 4


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path: Path) -> None:
    settings = ["train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=5"]
    first = offline_run(settings, tmp_path)
    for path in sorted((tmp_path / "checkpoints" / "checkpoint-3").rglob("*"), reverse=True):
        path.unlink()
    (tmp_path / "checkpoints" / "checkpoint-3").rmdir()
    killed(first.directory)
    run(compose(f"resume={first.directory}"))
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # the name holds the run's id
    assert '"train/loss"' in json.dumps(read(tmp_path))


def test_without_tracking_there_are_no_wandb_files(quick_run: Callable[..., Any]) -> None:
    assert not (quick_run().directory / "wandb").exists()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and a server that nobody can reach."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_without_a_network_two_runs_are_logged_offline_at_once(
    unreachable: None, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom lora_exp import compose, run\n"
        f"for n in '12': run(compose(*{[*QUICK, 'samples.rows=0']!r}), sys.argv[1] + n)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be reached") == 1
    assert time.perf_counter() - began < 80
    for n in "12":
        assert read(tmp_path / f"run{n}")


@pytest.fixture
def quick_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def go(**environment: str) -> Callable[..., Any]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return lambda *overrides: offline_run(["samples.rows=0", *overrides], tmp_path / "run")

    return go


def test_what_the_environment_asks_for_is_obeyed(
    quick_wandb: Callable[..., Any], tmp_path: Path
) -> None:
    go = quick_wandb(WANDB_PROJECT="theirs", WANDB_TAGS="one,two", WANDB_RUN_GROUP="g" * 200)
    go("tracking.tags=[three]", "tracking.name=mine")
    (about,) = (r["run"] for r in read(tmp_path / "run") if r["type"] == "run")
    assert (about["project"], about["display_name"]) == ("theirs", "mine")
    assert {"one", "two", "three", "peft=lora"} <= set(about["tags"])
    assert len(about["run_group"]) == 128


def test_a_disabled_wandb_logs_nothing_and_says_so(
    quick_wandb: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_wandb(WANDB_MODE="disabled")()
    assert not list((tmp_path / "run").glob("wandb/*run*"))
    assert "wandb sync" not in capsys.readouterr().out


def test_an_agents_run_is_the_run(quick_wandb: Callable[..., Any], tmp_path: Path) -> None:
    quick_wandb(WANDB_RUN_ID="trial7")()
    assert json.loads((tmp_path / "run/run.json").read_text())["tracking_id"] == "trial7"
    (about,) = (r["run"] for r in read(tmp_path / "run") if r["type"] == "run")
    assert about["run_id"] == "trial7"


def test_long_groups_that_begin_alike_stay_apart() -> None:
    one, other = (_fitting("sweep/" + "x" * 200 + end) for end in "ab")
    assert one != other
    assert {len(one or ""), len(other or "")} == {128}
    assert _fitting("day/time") == "day/time"
