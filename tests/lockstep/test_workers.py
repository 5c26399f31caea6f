"""Several workers: jobs meet at rungs across processes, and one worker's death changes nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose, run
from lora_exp.lockstep.workers import exit_reason
from tests.conftest import QUICK
from tests.test_main import cli
from tests.warm import Process

GRID = ["peft.r=2,4", "train.learning_rate=1e-4,3e-3"]
SETTINGS = ["tracking=none", *QUICK, "samples.rows=0", "train.max_steps=8"]
SETTINGS += ["train.save_strategy=no"]
SWEEP = ["-m", *GRID, *SETTINGS, "early_stopping=halving", "early_stopping.eta=2"]
SWEEP += ["early_stopping.first_rung=0.25", "hydra.launcher.workers=2", "hydra.sweep.dir=a/b"]
ADAPTER = "adapter/adapter_model.safetensors"


def outcome(sweep: Path) -> list[Any]:
    records = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/run.json"))]
    adapters = {path.parts[-3]: path.read_bytes() for path in sweep.glob(f"*/{ADAPTER}")}
    return [adapters, *((r["status"], r["stopped"], r["rungs"]) for r in records)]


@pytest.fixture(scope="module")
def one_thread() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The directory of a sweep in two workers."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = cli(*SWEEP, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "in 2 workers, each with 1 thread" in done.stdout
    return folder / "a/b"


def test_jobs_in_two_workers_meet_at_rungs_without_a_checkpoint(
    uninterrupted: Path, tmp_path: Path
) -> None:
    adapters, *ends = outcome(uninterrupted)
    assert sorted(len(rungs) for _, _, rungs in ends) == [1, 1, 2, 2]
    assert {rungs[0]["of"] for _, _, rungs in ends} == {4}
    assert not list(uninterrupted.glob("*/checkpoints/*"))
    ((best, weights),) = adapters.items()
    rank, rate = ("2", "4")[int(best) // 2], ("1e-4", "3e-3")[int(best) % 2]
    alone = run(compose(f"peft.r={rank}", f"train.learning_rate={rate}", *SETTINGS), tmp_path / "0")
    assert (alone.directory / ADAPTER).read_bytes() == weights


def test_the_number_of_workers_changes_no_bit(tmp_path: Path, one_thread: None) -> None:
    bases = ["-m", "model.dtype=float32,bfloat16", "peft.r=2,4", *SETTINGS, "train.max_steps=2"]
    adapters = []
    for workers in (1, 2, 3):
        sweep = [f"hydra.launcher.workers={workers}", f"hydra.sweep.dir={workers}"]
        done = cli(*bases, *sweep, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert workers == 1 or f"in {workers} workers, each with 1 thread" in done.stdout
        paths = sorted((tmp_path / str(workers)).glob(f"*/{ADAPTER}"))
        adapters.append([path.read_bytes() for path in paths])
    assert len(adapters[0]) == 4
    assert adapters[0] == adapters[1] == adapters[2]


def test_one_workers_death_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as output:
        process = Process(
            "-m", "lora_exp", *SWEEP, cwd=tmp_path, stdout=output, stderr=output, new_session=True
        )
        while not any(rungs for _, _, rungs in outcome(tmp_path / "a/b")[1:]):
            time.sleep(0.02)
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait() == 0
    assert "a worker was killed by SIGKILL" in (tmp_path / "out").read_text()
    assert outcome(tmp_path / "a/b") == outcome(uninterrupted)


def test_a_workers_death_is_reported_with_its_signal_and_a_remedy() -> None:
    assert "SIGKILL" in exit_reason(-9)
    assert "lockstep.max_jobs" in exit_reason(-9)
    assert exit_reason(3) == "gone with exit code 3"
