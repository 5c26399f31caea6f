"""A sweep is launched again as it was: which jobs are the same, and what differs in the others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from lora_exp import cli
from lora_exp.after import relaunch as relaunch_file
from lora_exp.after.likeness import Likeness
from lora_exp.after.relaunch import JobLikeness, read_sweep_recipe, relaunch
from lora_exp.after.verdict import jobs_page
from lora_exp.errors import Interrupted, SavedError
from lora_exp.files.paths import SCRATCH
from tests.warm import Process, python

SWEEP = ["-m", "seed=1,2,3", "tracking=none", "peft.r=2", "targets=qv"]
SWEEP += ["data.max_rows=16", "data.max_eval_rows=2", "train.per_device_train_batch_size=2"]
SWEEP += ["samples.rows=0", "train.max_steps=4", "report=null", "early_stopping=halving"]
SWEEP += ["early_stopping.eta=3", "early_stopping.first_rung=0.5"]


class Forked(Process):
    """A command that is forked from a process that has imported torch."""

    output: ClassVar[str] = ""  # what all have printed and logged

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        assert command[0] == sys.executable
        super().__init__(*command[1:], env=env)

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        for file in self._outputs:
            if not file.closed:
                with file:
                    file.seek(0)
                    Forked.output += file.read()
        return code

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def trained_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    done = python("-m", "lora_exp", *SWEEP, "hydra.sweep.dir=sweep", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "sweep"


@pytest.fixture
def sweep(trained_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A halved sweep, whose files may be changed."""
    monkeypatch.setattr(relaunch_file, "subprocess", SimpleNamespace(Popen=Forked))
    return Path(shutil.copytree(trained_sweep, tmp_path / "sweep"))


def edit(job: Path, **values: object) -> None:
    path = job / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_each_job_is_compared_with_its_new_training(sweep: Path, tmp_path: Path) -> None:
    (winner,) = (path.parent for path in sweep.glob("*/adapter"))
    pruned, other = sorted({*sweep.glob("[0-2]")} - {winner})
    edit(other, status="failed", date="2026-01-02")
    weights = winner / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    out = tmp_path / "again"
    result = CliRunner().invoke(cli.app, ["reproduce", str(sweep), "-o", str(out)])
    before, _, after = result.stdout.partition("\ncompared")
    assert "lockstep, exact" in before
    assert "a chat template has written the date 2026-01-02" in before
    rows = {line.split()[1]: line for line in after.splitlines() if line.startswith("│")}
    assert "adapter/adapter_model.safetensors differs" in after
    assert "the same" in rows[winner.name]  # its metrics
    assert "none saved" in rows[pruned.name]
    assert "differs" not in rows[pruned.name]
    assert "failed, now pruned" in rows[other.name]
    assert "not reproduced: 1 of 3 jobs are the same" in after
    assert result.exit_code == 1
    records = [json.loads((out / name / "run.json").read_text()) for name in "012"]
    assert [record["place"] for record in records] == ["lockstep, exact"] * 3
    assert [record["choices"]["tracking"] for record in records] == ["none"] * 3
    assert not (out / "report.html").exists()


def page(renderable: RenderableType) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_jobs_that_are_the_same_are_counted_and_a_missing_one_is_named() -> None:
    same = JobLikeness("0", "finished", "finished", True, Likeness(6, 9, [], [], []))
    assert "reproduced: 1 of 1 jobs are the same" in page(jobs_page([same], [], None))
    missing = JobLikeness("1", "finished", "missing", False, None)
    other = JobLikeness("2", "pruned", "pruned", False, Likeness(0, 9, [], [], []))
    assert [result.same for result in (same, missing, other)] == [True, False, False]
    text = page(jobs_page([same, missing, other], [], Path("again")))
    assert "finished, now missing" in text
    assert "pruned; another config" in text
    assert "not reproduced: 1 of 3 jobs are the same; the others differ and nothing on" in text


def test_what_cannot_be_launched_again_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('["-m", "seed=1,2"]')
    with pytest.raises(SavedError, match=r"has no job with a run\.json"):
        read_sweep_recipe(tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3/run.json").write_text('{"status": "interrupted"}')
    with pytest.raises(SavedError, match=r"not ended: job 3 of .*; resume=.* goes on"):
        read_sweep_recipe(tmp_path)


def test_what_is_only_reported_is_not_launched_again(sweep: Path, tmp_path: Path) -> None:
    """Not with the tracker, the report and the directory that the sweep had."""
    command = ["-m", "--config-dir", "a.b/c", "seed=1,2,3", "tracking=[wandb]", "tracking.tags=[t]"]
    (sweep / "sweep.json").write_text(json.dumps([*command, "report=r.html"]))
    recipe = read_sweep_recipe(sweep, ["trusted_targets=[a.b]"])
    kept = ["-m", "--config-dir", "a.b/c", "seed=1,2,3", "tracking=none", "report=null"]
    assert recipe.command == [*kept, "trusted_targets=[a.b]"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(SavedError, match="exists and is not empty"):
        relaunch(recipe, tmp_path / "out")


def test_a_signal_ends_the_launch_before_its_folder_is_deleted(sweep: Path) -> None:
    def stop() -> None:
        while not list(sweep.parent.glob("lora-exp-reproduce-*/run/*/run.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    Forked.output = ""
    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Interrupted):
        relaunch(read_sweep_recipe(sweep))
    stopping.join()
    assert list(sweep.parent.iterdir()) == [sweep]
    assert "interrupted" in Forked.output
    assert SCRATCH not in Forked.output
