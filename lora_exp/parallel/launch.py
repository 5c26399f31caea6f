"""Start the processes of a run from its resolved config, and wait for them.

torchrun would start them, too, but ends the others 30 s after the first has ended, in whatever they
are, and passes on neither exit codes nor errors. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lora_exp import errors
from lora_exp.config.door import plain
from lora_exp.config.processes import (
    CUDA,
    THREADS,
    VISIBLE,
    node_count,
    process_count,
    threads_each,
)
from lora_exp.errors import ConfigError, Interrupted, LoraExpError

log = logging.getLogger("lora_exp")
COUNTS = (
    "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
JOB, MEETING, RESULT = "run.json", "meeting", "result-{}.json"
# seconds for the others to end where all fail alike, or have agreed to stop: trackers may upload
GRACE = {False: 30.0, True: 600.0}
TICK = 0.05  # seconds between two looks
STOPPED = 75  # exit code of a process that was asked to stop
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOST = "lost"  # kind of an error: another process has ended


def check_single_process() -> None:
    """Refuse to run as one of several processes, each of which would train and write a run.

    Raises:
        ConfigError: torchrun, accelerate launch, mpirun, srun or similar has started several.
    """
    for name in COUNTS:
        count = os.environ.get(name, "1")
        if count != "1":
            text = f"{count}: a run starts its processes itself; without torchrun, accelerate"
            text = f"{text} launch, mpirun or srun, type parallel=ddp parallel.processes={count}"
            if name.startswith("SLURM"):
                text = f"{text}, with parallel.nodes on several nodes"
            raise ConfigError([(name, f"{text} (or unset {name})")])


class Processes:
    """The processes of one run."""

    def __init__(self, count: int, folder: Path) -> None:
        """Create them, without starting any.

        Args:
            count: how many there are.
            folder: a private one, which has the run as `JOB`.
        """
        self.count, self.folder, self.asked = count, folder, False
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start them; the first alone prints."""
        command = [sys.executable, "-P", "-m", "lora_exp.rank", str(self.folder)]
        for rank in range(self.count):
            silent = subprocess.DEVNULL if rank else None
            process = subprocess.Popen(
                command, env=environment(rank, self.count, self.count),
                stdin=subprocess.DEVNULL, stdout=silent, stderr=silent,
                start_new_session=True,  # Ctrl-C reaches them through this process, once
            )  # fmt: skip
            self.all.append(process)

    def ask_to_stop(self) -> None:
        """Let them save at the end of a step, and end."""
        self.asked = True
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End them at once."""
        self._send(signal.SIGKILL)
        for process in self.all:
            process.wait()

    def wait(self) -> None:
        """Wait until all have ended; where one has failed, the others end too.

        Raises:
            Interrupted: they were asked to stop.
            LoraExpError: what one of them has raised, or that it was killed.
        """
        while not any(codes := self._codes()) and None in codes:
            time.sleep(TICK)
        killed = any(code is not None and code < 0 for code in codes)
        patience = GRACE[STOPPED in codes]
        until = time.monotonic() + (0.0 if killed else patience)
        while None in (codes := self._codes()) and time.monotonic() < until:
            time.sleep(TICK)
        self.kill()
        if any(codes):
            raise self._error(codes)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.all]

    def _error(self, codes: list[int | None]) -> BaseException:
        """Return the cause: a signal, an error that is no other's consequence, or a stop.

        Args:
            codes: how each has ended by itself; None: it was still running.
        """
        signals = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
        if STOPPED in codes or (signals and (self.asked or min(signals.values()) in ASKING)):
            return Interrupted()
        for rank, number in signals.items():
            name = signal.Signals(number).name
            hint = " (is memory short?)" if number == signal.SIGKILL else ""
            return LoraExpError(f"process {rank} of {self.count} was killed by {name}{hint}")
        failed = {rank: self.result(rank) for rank, code in enumerate(codes) if code}
        causes = [rank for rank, result in failed.items() if result.get("kind") != LOST]
        rank = [*causes, *failed][0]
        if trace := failed[rank].get("traceback"):
            log.info("process %d of %d: %s", rank, self.count, trace)
        return _raised(rank, self.count, failed[rank], codes[rank])

    @property
    def first_was_lost(self) -> bool:
        """Return whether the first process could not record how the run has ended."""
        return self.all[0].returncode < 0 or self.result(0).get("kind") == LOST

    def result(self, rank: int) -> dict[str, Any]:
        """Return what a process has reported; empty: nothing."""
        path = self.folder / RESULT.format(rank)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def _send(self, number: int) -> None:
        for process in self.all:
            if process.poll() is None:
                process.send_signal(number)


def _raised(rank: int, count: int, result: Mapping[str, Any], code: int | None) -> Exception:
    """Return the error that a process has reported."""
    kind = getattr(errors, str(result.get("kind")), None)
    if kind is not None and "faults" in result:
        return kind([tuple(fault) for fault in result["faults"]])  # type: ignore[no-any-return]
    if kind is not None:
        return kind(result["text"])  # type: ignore[no-any-return]
    text = result.get("text") or f"ended with exit code {code}"
    return LoraExpError(f"process {rank} of {count}: {text}")


def environment(rank: int | None, count: int, each: int) -> dict[str, str]:
    """Return the environment of one of a run's processes: torchrun's names, devices, threads.

    Args:
        rank: the process's number; None: Slurm gives it.
        count: of processes.
        each: of processes on a machine.
    """
    values = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(each)}
    if rank is not None:
        values |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # they are on one machine, and nobody else needs to reach them
        values["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    values["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns that no parameter was unused
    values["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    values["DS_ACCELERATOR"] = "cuda" if VISIBLE else "cpu"  # DeepSpeed warns when it looks itself
    if VISIBLE:
        return {**os.environ, **values, CUDA: ",".join(VISIBLE[:each])}
    return {**os.environ, **values, THREADS: threads_each(each)}


@contextmanager
def started(
    cfg: DictConfig,
    directory: Path,
    sweep: str | None,
    day: date | None,
    processes_of: Callable[[int, Path, int], Processes],
) -> Iterator[Processes]:
    """Start the processes of a run; at the end of this context none is left.

    They get the resolved config as a file, in which validation has allowed no secret.

    Args:
        cfg: the run's config.
        directory: the run's.
        sweep: its name, if the run is one of a sweep.
        day: as of `experiment.run`.
        processes_of: makes them from their number, a private folder, and the number of nodes.
    """
    job = {
        "config": plain(cfg),
        "directory": str(directory.absolute()),
        "sweep": sweep,
        "day": day.isoformat() if day else None,
        "logging": _logging(),
        "launcher": os.getpid(),
        "nodes": (nodes := node_count(cfg)),
    }
    # of the machine, or where other nodes see it, too
    shared = None if nodes == 1 else directory.absolute()
    if shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lora-exp-", dir=shared) as folder:
        (Path(folder) / JOB).write_text(json.dumps(job), encoding="utf-8")
        processes = processes_of(process_count(cfg), Path(folder), nodes)
        try:
            processes.start()
            yield processes
        finally:
            processes.kill()


def _logging() -> Any:
    """Return how Hydra logs in this process: the first of the run's logs so, too."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    settings = {
        "job_logging": OmegaConf.to_container(hydra.job_logging, resolve=True),
        "verbose": hydra.verbose,
    }
    return OmegaConf.to_container(OmegaConf.create(settings))
