"""A run on two nodes of a real Slurm: the bytes of two processes here, whatever ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_exp import compose, run
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.parallel.nodes import JOB_NODES, NodeProcesses
from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]
RUN = ["tracking=none", *QUICK, "samples.rows=0", "train.max_steps=10", "parallel.processes=2"]
RUN += ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=20"]
RUN += ["peft.lora_dropout=0.1"]


def submitted(directory: Path, *overrides: str) -> str:
    """Submit a Slurm job of two nodes, and return its number; its words go to a file."""
    words = [sys.executable, str(ROOT / "run.py"), *overrides, f"hydra.run.dir={directory}"]
    line = " ".join(f"'{word}'" for word in words)
    folder = directory.parent
    (folder / "job.code").unlink(missing_ok=True)
    (folder / "job.sh").write_text(
        f"#!/bin/sh\n{line}\necho $? > {folder}/code\nmv {folder}/code {folder}/job.code\n"
    )
    options = ["--nodes=2", f"--output={folder}/job.out", "--parsable", str(folder / "job.sh")]
    command = ["sbatch", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def ended(directory: Path) -> int:
    """Wait for the end of a Slurm job, and return its exit code: `sbatch --wait` looks rarely."""
    code, until = directory.parent / "job.code", time.monotonic() + 240
    while not code.is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    return int(code.read_text())


def wait_for_checkpoint(directory: Path, step: int) -> None:
    until = time.monotonic() + 120
    while not list(directory.glob(f"checkpoints/checkpoint-{step}")):
        assert time.monotonic() < until
        time.sleep(0.01)


def process_of(rank: int) -> int:
    """Return the process that Slurm has started with a number."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            values = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = b"lora_exp.rank" in words and not words[0].endswith(b"srun")
        if is_rank and f"SLURM_PROCID={rank}".encode() in values:
            return int(process.name)
    raise AssertionError(f"no process is {rank}")


def test_a_run_on_two_nodes_equals_two_processes_here_though_it_is_stopped_and_killed(
    slurm: None, tmp_path: Path
) -> None:
    here = run(compose(*RUN, "parallel=ddp"), tmp_path / "here").saved
    directory, log = tmp_path / "nodes", tmp_path / "job.out"
    number = submitted(directory, *RUN, "parallel=ddp", "parallel.nodes=2")
    wait_for_checkpoint(directory, 2)
    subprocess.run(["scancel", "--signal=TERM", f"{number}.0"], check=True)
    assert ended(directory) == 75, log.read_text()
    assert "2 on 2 nodes, each takes 2 of the 4 rows of a step" in log.read_text()
    submitted(directory, f"resume={directory}")
    wait_for_checkpoint(directory, 6)
    os.kill(process_of(1), signal.SIGKILL)
    assert ended(directory) == 1, log.read_text()
    assert "process 1 of 2 was killed by SIGKILL" in log.read_text()
    submitted(directory, f"resume={directory}")
    assert ended(directory) == 0, log.read_text()
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert [(directory / "adapter" / n).read_bytes() for n in names] == [
        (here / n).read_bytes() for n in names
    ]
    assert not list(directory.glob("lora-exp-*"))


def test_nodes_without_a_slurm_job_that_has_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(JOB_NODES, raising=False)
    nodes = ["parallel=ddp", "parallel.nodes=2", "parallel.processes=4"]
    with pytest.raises(ConfigError, match=r"parallel.nodes: 2, but this is no Slurm job; sbatch"):
        run(compose(*RUN, *nodes), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setenv(JOB_NODES, "1")
    if shutil.which("srun"):
        with pytest.raises(ConfigError, match="2, but this Slurm job has 1; sbatch --nodes=2"):
            NodeProcesses(4, tmp_path, 2)


@pytest.mark.parametrize(
    ("nodes", "fault"),
    [
        ("3", "parallel.nodes: 3 does not divide 4 processes evenly"),
        ("0", "parallel.nodes: 0 does not divide 4 processes evenly"),
        ("two", "parallel.nodes: 'two' does not divide 4 processes evenly"),
    ],
)
def test_processes_that_nodes_cannot_share_are_refused(nodes: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        compose("parallel=ddp", "parallel.processes=4", f"parallel.nodes={nodes}")
    if nodes != "3":
        with pytest.raises(ConfigError, match=fault.replace("4", "1")):
            compose("parallel=ddp", f"parallel.nodes={nodes}")


def test_a_run_has_the_same_fingerprint_on_any_nodes() -> None:
    two = ["parallel=ddp", "parallel.processes=2"]
    nodes = [fingerprint(compose(*two, f"parallel.nodes={count}")) for count in (1, 2)]
    assert nodes[0] == nodes[1] != fingerprint(compose("parallel=ddp", "parallel.processes=4"))


def test_an_srun_that_cannot_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(JOB_NODES, "2")
    processes = NodeProcesses(2, tmp_path, 2)
    processes.start()
    with pytest.raises(LoraExpError, match="srun ended with exit code 3 before the processes had"):
        processes.wait()
