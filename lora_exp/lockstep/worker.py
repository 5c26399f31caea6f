"""The worker: the process in which a plan's jobs train, pack after pack.

It is forked from the launcher, which has not imported torch: the task, its resolvers and plugins
are there, and nothing of a GPU is.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lora_exp.errors import DivergedError, Interrupted, LoraExpError
from lora_exp.training.interruption import stop

Config = tuple[int, DictConfig]
KNOWN = ("builtins", "lora_exp", "hydra", "omegaconf")  # whose errors the launcher can have


def end_with(launcher: int) -> None:
    """Have this process asked to stop when the launcher is gone, however it went (prctl(2))."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        raise SystemExit(130)


@dataclass(frozen=True)
class Seats:
    """Jobs that share a base, and how; `mode` None: each has the process to itself."""

    jobs: tuple[Config, ...]
    mode: str | None
    max_jobs: int | None
    names: tuple[str, ...] = ()
    verify: float = 0.0


class Launch(Protocol):
    """Hears what becomes of jobs, each by its number."""

    def began(self, number: int) -> None:
        """Hear that a job begins."""

    def ended(self, number: int, result: JobReturn) -> None:
        """Hear how a job ended."""

    def unproven(self, numbers: list[int], difference: str) -> None:
        """Hear that a pass of these jobs' pack was not the run alone; they may still train."""


class Worker:
    """The launcher's side: a process that is sent work, and tells what became of it."""

    def __init__(self, context: HydraContext, task: TaskFunction, warm: bool) -> None:
        self.arguments = (context, task, warm)
        self.replace()

    def replace(self) -> None:
        """Start a process, the first or one for another that died."""
        fork = get_context("fork")
        self.pipe, theirs = fork.Pipe()
        arguments = (theirs, self.pipe, os.getpid(), *self.arguments)
        self.process = fork.Process(target=_work, args=arguments)
        self.process.start()
        theirs.close()

    def run(self, work: list[Seats], launch: Launch) -> None:
        """Send work and report each job as it begins and ends, until all have or the worker died.

        Raises:
            LoraExpError: it died; what had begun and not ended was lost with it.
        """
        stop.forward = self._ask_to_stop  # it knows when its jobs come to a step's end
        try:
            self._send(work)
            while (message := self._received()) is not None:
                said, *about = message
                if said == "over":
                    return
                getattr(launch, said)(*about)
        finally:
            stop.forward = None
        self.process.join()
        raise LoraExpError(f"the worker was {_ending(self.process.exitcode or 0)}")

    def _send(self, work: list[Seats]) -> None:
        with suppress(OSError):  # it is gone, as `_received` finds
            self.pipe.send(work)

    def _received(self) -> tuple[Any, ...] | None:
        """Wait for what the worker has to say; None: it is gone."""
        wait([self.pipe, self.process.sentinel])
        try:
            return tuple(self.pipe.recv()) if self.pipe.poll() else None
        except (EOFError, OSError):
            return None  # it died while it said something

    def stop(self, at_once: bool = False) -> None:
        """Let the process go; one that still works may save what it has, unless it is urgent."""
        self.pipe.close()
        self.process.join(timeout=3)
        patient = [] if at_once else [self._ask_to_stop]
        for ask in (*patient, self.process.kill):
            if self.process.is_alive():
                ask()
                self.process.join(timeout=60)

    def _ask_to_stop(self) -> None:
        if self.process.is_alive():
            self.process.terminate()  # SIGTERM


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is memory short? lockstep.max_jobs=... takes fewer)" if code == -9 else ""
        return f"killed by {name}{hint}"
    return f"gone with exit code {code}"


def _work(
    pipe: Connection,
    theirs: Connection,
    launcher: int,
    context: HydraContext,
    task: TaskFunction,
    warm: bool,
) -> None:
    stop.inherited()
    end_with(launcher)
    theirs.close()  # else the launcher's end would stay open in here when the launcher is gone
    # the launcher's callbacks stay with the launcher
    context = HydraContext(config_loader=context.config_loader, callbacks=Callbacks())
    try:
        with stop.listening():
            _carry_out(pipe, context, task, warm)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(130)  # interrupted, or the launcher is gone: records are in order, say no more


def _carry_out(pipe: Connection, context: HydraContext, task: TaskFunction, warm: bool) -> None:
    if warm:
        import lora_exp.experiment
        import lora_exp.lockstep.seat  # noqa: F401  (while the launcher composes)
    for seats in pipe.recv():
        report = _Report(pipe, context, task)
        if seats.mode is None:
            for number, config in seats.jobs:
                report.run(number, config)
        else:
            _pack(seats, report)
            gc.unfreeze()  # with the pack goes its base
            gc.collect()
    pipe.send(("over",))


@dataclass
class _Report:
    pipe: Connection
    context: HydraContext
    task: TaskFunction

    def send(self, *said: Any) -> None:
        try:
            self.pipe.send(said)
        except OSError as error:  # nobody listens any more
            if not stop.asked:  # else every job still comes to its step's end
                raise KeyboardInterrupt from error

    def run(self, number: int, config: DictConfig) -> JobReturn:
        """Run one job as every launcher does, and send what it returned."""
        if stop.asked:
            return failed(config, Interrupted())  # it has not begun, and nobody waits for it
        self.send("began", number)
        try:
            result = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Interrupted as error:  # the others come to their own step's end
            result = failed(config, error)
        except Exception as error:  # Hydra's own, before or after the task
            result = failed(config, error)
        self.send("ended", number, portable(result))
        return result


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a job's own part of what Hydra composed."""
    task = config.copy()
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def failed(config: DictConfig, error: BaseException) -> JobReturn:
    """Return what Hydra would have returned of a job, had it been able to."""
    result = JobReturn()
    result.cfg = without_hydra(config)
    result.hydra_cfg = OmegaConf.masked_copy(config, "hydra")
    result.overrides = list(config.hydra.overrides.task)
    result.working_dir, result.task_name = str(Path.cwd()), config.hydra.job.name
    result.return_value, result.status = error, JobStatus.FAILED
    return result


def portable(result: JobReturn) -> JobReturn:
    """Return a job's result as it can be sent: errors of other packages as their text.

    The launcher would import torch to know one of torch's, and others may not be sent at all.
    """
    value = result._return_value
    if isinstance(value, Exception) and type(value).__module__.split(".")[0] not in KNOWN:
        result._return_value = LoraExpError(f"{type(value).__name__}: {value}")
    return result


def _pack(seats: Seats, report: _Report) -> None:
    from lora_exp.lockstep.pack import Pack
    from lora_exp.lockstep.seat import Seat
    from lora_exp.lockstep.table import Row, Table
    from lora_exp.model.memory import keep_freed
    from lora_exp.training.place import here

    keep_freed()
    rows = [Row(n, name) for (n, _), name in zip(seats.jobs, seats.names, strict=True)]
    pack = Pack(seats.mode or "exact", seats.max_jobs, seats.verify)
    table = Table("in lockstep", rows, pack.passes.counted)

    def job(place: int, number: int, config: DictConfig) -> Callable[[], None]:
        def run() -> None:
            here.set(Seat(pack, place, rows[place]))
            result = report.run(number, config)
            table.ended(rows[place], _status(result._return_value))

        return run

    def tell(places: list[int], difference: str) -> None:
        report.send("unproven", [seats.jobs[place][0] for place in places], difference)

    pack.passes.verification.tell = tell
    pack.hub.tick = table.tick
    with table.open():
        pack.hub.run(job(place, *about) for place, about in enumerate(seats.jobs))


def _status(returned: Any) -> str:
    """Return how a job ended, in the words of its record."""
    if isinstance(returned, DivergedError):
        return "diverged"
    if isinstance(returned, Interrupted):
        return "interrupted"
    return "failed" if isinstance(returned, Exception) else "finished"
