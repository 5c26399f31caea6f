"""The worker: the process in which a plan's jobs train, pack after pack.

It is forked from the launcher, which has not imported torch: so it has the task, its resolvers and
plugins, but no GPU state.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Mapping
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

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import DivergedError, Interrupted, LoraExpError, Paused
from lora_exp.lockstep.work import Work
from lora_exp.record.standing import how_ended
from lora_exp.training.interruption import stop
from lora_exp.training.place import Alone, here

STATUSES = {
    DivergedError: "diverged", Paused: "paused", Interrupted: "interrupted", Exception: "failed",
}  # fmt: skip
# packages whose errors can be sent to the launcher
SENDABLE = ("builtins", "lora_exp", "hydra", "omegaconf")


def end_with_parent(launcher: int) -> None:
    """Have the system send SIGTERM to this process when the launcher ends (prctl(2))."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        raise SystemExit(130)


class Launch(Protocol):
    """Receives the events of jobs, each named by its number."""

    def began(self, number: int) -> None:
        """A job begins."""

    def ended(self, number: int, result: JobReturn) -> None:
        """A job has ended."""

    def unproven(self, numbers: list[int], difference: str) -> None:
        """A pass of these jobs' pack differed from the run alone; they may still train."""


class Worker:
    """The launcher's side: a process that gets work and reports events."""

    def __init__(self, context: HydraContext, task: TaskFunction, warm: bool) -> None:
        self.arguments = (context, task, warm)
        self.replace()

    def replace(self) -> None:
        """Start a process: the first, or one in place of one that died."""
        fork = get_context("fork")
        self.pipe, other_end = fork.Pipe()
        arguments = (other_end, self.pipe, os.getpid(), *self.arguments)
        self.process = fork.Process(target=_work, args=arguments)
        self.process.start()
        other_end.close()

    def run(self, work: list[Work], launch: Launch) -> None:
        """Send work and pass on its events, until all of it is done or the worker has died.

        Raises:
            LoraExpError: the worker died; jobs that had begun and not ended are lost.
        """
        stop.forward = self._ask_to_stop  # the worker stops its jobs at the end of a step
        try:
            self._send(work)
            while (message := self._received()) is not None:
                event, *arguments = message
                if event == "over":
                    return
                getattr(launch, event)(*arguments)
        finally:
            stop.forward = None
        self.process.join()
        raise LoraExpError(f"the worker was {_exit_reason(self.process.exitcode or 0)}")

    def _send(self, work: list[Work]) -> None:
        with suppress(OSError):  # it has died; `_received` notices
            self.pipe.send(work)

    def _received(self) -> tuple[Any, ...] | None:
        """Wait for the worker's next event; None: it has died."""
        wait([self.pipe, self.process.sentinel])
        try:
            return tuple(self.pipe.recv()) if self.pipe.poll() else None
        except (EOFError, OSError):
            return None  # it died while it sent an event

    def stop(self, at_once: bool = False) -> None:
        """End the process; if it still trains, let it save a checkpoint first, unless `at_once`."""
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


def _exit_reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is memory short? lockstep.max_jobs=... takes fewer)" if code == -9 else ""
        return f"killed by {name}{hint}"
    return f"gone with exit code {code}"


def _work(
    pipe: Connection,
    other_end: Connection,
    launcher: int,
    context: HydraContext,
    task: TaskFunction,
    warm: bool,
) -> None:
    stop.inherited()
    end_with_parent(launcher)
    other_end.close()  # else the pipe would stay open after the launcher has ended
    # the launcher's callbacks stay with the launcher
    context = HydraContext(config_loader=context.config_loader, callbacks=Callbacks())
    try:
        with stop.listening():
            _run_all(pipe, context, task, warm)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(130)  # interrupted, or the launcher has ended: the records are complete


def _run_all(pipe: Connection, context: HydraContext, task: TaskFunction, warm: bool) -> None:
    if warm:
        import lora_exp.experiment
        import lora_exp.lockstep.seat  # noqa: F401  (while the launcher composes)
    while parts := _received(pipe):
        for work in parts:
            _run(work, pipe, context, task)
        pipe.send(("over",))


def _received(pipe: Connection) -> list[Work]:
    """Wait for work; none: the launcher has no more."""
    try:
        return list(pipe.recv())
    except EOFError:
        return []


def _run(work: Work, pipe: Connection, context: HydraContext, task: TaskFunction) -> None:
    report = _Report(pipe, context, task, work.brackets)
    if work.mode is not None:
        _train_pack(work, report)
        gc.unfreeze()  # free the pack and its base
        gc.collect()
        return
    for number, config in work.jobs:
        here.set(Alone(number, work.brackets.get(number)))
        report.run(number, config)


@dataclass
class _Report:
    pipe: Connection
    context: HydraContext
    task: TaskFunction
    brackets: Mapping[int, Bracket]

    def send(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError as error:  # the launcher has ended
            if not stop.asked:  # else let every job reach the end of its step
                raise KeyboardInterrupt from error

    def run(self, number: int, config: DictConfig) -> JobReturn:
        """Run one job as every launcher does, and send the result."""
        if stop.asked:
            return failed(config, Interrupted())  # it has not begun
        self.send("began", number)
        try:
            result = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Interrupted as error:  # the others stop at the end of their own step
            result = failed(config, error)
        except Exception as error:  # Hydra's errors, before or after the task
            result = failed(config, error)
        value = result._return_value
        if number in self.brackets and not isinstance(value, Interrupted):
            self.brackets[number].end(number, failed=isinstance(value, Exception))
        self.send("ended", number, portable(result))
        return result


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed config without the `hydra` section."""
    task = config.copy()
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def failed(config: DictConfig, error: BaseException) -> JobReturn:
    """Return the result of a job that ended before Hydra could return one."""
    return returned(config, error, JobStatus.FAILED)


def returned(config: DictConfig, value: Any, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    """Return the result of a job that Hydra has not run."""
    result = JobReturn()
    result.cfg = without_hydra(config)
    result.hydra_cfg = OmegaConf.masked_copy(config, "hydra")
    result.overrides = list(config.hydra.overrides.task)
    result.working_dir, result.task_name = str(Path.cwd()), config.hydra.job.name
    result.return_value, result.status = value, status
    return result


def portable(result: JobReturn) -> JobReturn:
    """Return a job's result in a form that can be sent: errors of other packages as text.

    To unpickle torch's errors the launcher would have to import torch; others cannot be pickled.
    """
    value = result._return_value
    if isinstance(value, Exception) and type(value).__module__.split(".")[0] not in SENDABLE:
        result._return_value = LoraExpError(f"{type(value).__name__}: {value}")
    return result


def _train_pack(work: Work, report: _Report) -> None:
    from lora_exp.lockstep.pack import Pack
    from lora_exp.lockstep.seat import Seat
    from lora_exp.lockstep.table import Row, Table
    from lora_exp.model.memory import keep_freed

    keep_freed()
    rows = [Row(n, name) for (n, _), name in zip(work.jobs, work.names, strict=True)]
    pack = Pack(work.mode or "exact", work.max_jobs, work.verify)
    table = Table("in lockstep", rows, pack.passes.trained_tokens)

    def job(index: int, number: int, config: DictConfig) -> Callable[[], None]:
        def run() -> None:
            here.set(Seat(pack, index, rows[index], number, work.brackets.get(number)))
            result = report.run(number, config)
            table.ended(rows[index], *_ended(result))

        return run

    def report_difference(indices: list[int], difference: str) -> None:
        report.send("unproven", [work.jobs[index][0] for index in indices], difference)

    pack.passes.verification.on_difference = report_difference
    pack.hub.tick = table.tick
    with table.open():
        pack.hub.run(job(index, *arguments) for index, arguments in enumerate(work.jobs))


def _ended(result: JobReturn) -> tuple[str, str]:
    """Return how a job ended, as in run.json, and why it ended early, if it did."""
    returned = result._return_value
    for kind, status in STATUSES.items():
        if isinstance(returned, kind):
            return status, ""
    directory = Path(str(result.hydra_cfg.hydra.runtime.output_dir))  # type: ignore[union-attr]
    status, reason = how_ended(directory)
    return status or "finished", reason  # a task that is not ours has no record
