"""The processes of a run on several nodes of a Slurm job, started by srun. Needs no torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from lora_exp.child import end_with_parent
from lora_exp.errors import ConfigError, Interrupted, LoraExpError
from lora_exp.parallel.launch import LOST, MEETING, Processes, environment

JOB_NODES = "SLURM_JOB_NUM_NODES"  # how many this Slurm job has
END_S = 60.0  # for Slurm to end them; then srun itself is killed


def processes_of(count: int, folder: Path, nodes: int) -> Processes:
    """Return a run's processes, here or on several nodes, before any is started.

    Raises:
        ConfigError: there are no such nodes.
    """
    return Processes(count, folder) if nodes == 1 else NodeProcesses(count, folder, nodes)


class NodeProcesses(Processes):
    """The processes of one run, as many on each node."""

    def __init__(self, count: int, folder: Path, nodes: int) -> None:
        """Create them, without starting any.

        Args:
            count: how many there are.
            folder: a private one that all nodes share, which has the run as `launch.JOB`.
            nodes: how many nodes they are shared out among.

        Raises:
            ConfigError: this is no Slurm job with so many nodes.
        """
        super().__init__(count, folder)
        self.nodes = nodes
        self._check()

    @property
    def first_was_lost(self) -> bool:
        """Return whether the first process could not record how the run has ended."""
        return self.result(0).get("kind", LOST) == LOST and self.result(0).get("code") != 0

    def _check(self) -> None:
        """Refuse to start where srun would wait for nodes, or is not there."""
        has = os.environ.get(JOB_NODES, "0")
        if shutil.which("srun") is None and has != "0":
            raise ConfigError([("parallel.nodes", "there is no srun on PATH to start them with")])
        if int(has) < self.nodes:
            state = f"this Slurm job has {has}" if int(has) else "this is no Slurm job"
            cure = f"sbatch --nodes={self.nodes} --wrap 'python run.py ...', or in a sweep"
            cure = f"{cure} hydra.launcher.slurm.options={{nodes: {self.nodes}}}"
            raise ConfigError([("parallel.nodes", f"{self.nodes}, but {state}; {cure}")])

    def start(self) -> None:
        """Start them by one srun; the first process alone prints."""
        each = self.count // self.nodes
        command = [
            "srun", f"--nodes={self.nodes}", f"--ntasks={self.count}",
            f"--ntasks-per-node={each}", "--overlap", "--unbuffered", "--input=none",
            "--kill-on-bad-exit=1",
        ]  # fmt: skip
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # since 22.05 srun does not inherit it
            command.append(f"--cpus-per-task={cpus}")
        command += [sys.executable, "-P", "-m", "lora_exp.rank", str(self.folder)]
        process = subprocess.Popen(
            command, env=environment(None, self.count, each), stdin=subprocess.DEVNULL,
            start_new_session=True,
            # Slurm lets an srun whose parent was killed go on
            preexec_fn=partial(end_with_parent, os.getpid()),
        )  # fmt: skip
        self.all.append(process)

    def kill(self) -> None:
        """End them at once: Slurm does at a second Ctrl-C within a second."""
        (srun,) = self.all or (None,)
        if srun is None:
            return
        for _ in range(2 * (srun.poll() is None)):
            srun.send_signal(signal.SIGINT)
            time.sleep(0.2)
        try:
            srun.wait(END_S)
        except subprocess.TimeoutExpired:
            super().kill()

    def _codes(self) -> list[int | None]:
        """Return how each has ended: by its own word, or killed if it has left none.

        Slurm kills the others where one has failed: then these have no code.
        """
        if self.all[0].poll() is None:
            return [None] * self.count
        results = [self.result(rank) for rank in range(self.count)]
        has_failed = any(r.get("code") == 1 and r.get("kind") != LOST for r in results)
        return [r.get("code", None if has_failed else -signal.SIGKILL) for r in results]

    def _error(self, codes: list[int | None]) -> BaseException:
        results = [self.result(rank) for rank in range(self.count)]
        if not any(results) and self.asked:
            return Interrupted()
        if not any(results) and not (self.folder / MEETING).exists():
            code = self.all[0].returncode
            return LoraExpError(f"srun ended with exit code {code} before the processes had met")
        return super()._error(codes)
