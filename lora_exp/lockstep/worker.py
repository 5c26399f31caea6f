"""A worker's own side: the process in which jobs train, pack after pack.

It is forked from the launcher, which has not imported torch: so it has the task, its resolvers and
plugins, but no GPU state.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import DivergedError, Interrupted, LoraExpError, Paused
from lora_exp.lockstep.link import Link
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


def serve(
    pipe: Connection,
    launchers_ends: Iterable[Connection],
    launcher: int,
    context: HydraContext,
    task: TaskFunction,
    warm: bool,
) -> None:
    """Be a worker: run what comes through the pipe, until the launcher has no more.

    Args:
        pipe: this worker's end.
        launchers_ends: of all workers' pipes; a copy would keep them open after the launcher's end.
        launcher: its process id.
        context: the launcher's.
        task: what runs a job.
        warm: whether to import torch while the launcher still composes.
    """
    stop.inherited()
    end_with_parent(launcher)
    for end in launchers_ends:
        end.close()
    # the launcher's callbacks stay with the launcher
    context = HydraContext(config_loader=context.config_loader, callbacks=Callbacks())
    try:
        with stop.listening():
            _run_all(Link(pipe), context, task, warm)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(130)  # interrupted, or the launcher has ended: the records are complete


def _run_all(link: Link, context: HydraContext, task: TaskFunction, warm: bool) -> None:
    if warm:
        import lora_exp.experiment
        import lora_exp.lockstep.seat  # noqa: F401  (while the launcher composes)
    while (work := link.work()) is not None:
        link.join(work.brackets.values())
        _run(work, _Report(link, context, task, work.brackets))
        link.send("over")


def _run(work: Work, report: _Report) -> None:
    if work.mode is not None:
        _train_pack(work, report)
        gc.unfreeze()  # free the pack and its base
        gc.collect()
        return
    for number, config in work.jobs:
        here.set(Alone(number, work.brackets.get(number), report.link.news))
        report.run(number, config)


@dataclass
class _Report:
    link: Link
    context: HydraContext
    task: TaskFunction
    brackets: Mapping[int, Bracket]

    def run(self, number: int, config: DictConfig) -> JobReturn:
        """Run one job as every launcher does, and send the result."""
        if stop.asked:
            return failed(config, Interrupted())  # it has not begun
        self.link.send("began", number)
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
        self.link.send("ended", number, portable(result))
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
    pack = Pack(work.mode or "exact", work.max_jobs, work.verify, memory_share=work.memory_share)
    table = Table("in lockstep", rows, pack.passes.trained_tokens)

    def job(index: int, number: int, config: DictConfig) -> Callable[[], None]:
        def run() -> None:
            here.set(Seat(pack, index, rows[index], number, work.brackets.get(number)))
            result = report.run(number, config)
            table.ended(rows[index], *_ended(result))

        return run

    def report_difference(indices: list[int], difference: str) -> None:
        report.link.send("unproven", [work.jobs[index][0] for index in indices], difference)

    pack.passes.verification.on_difference = report_difference

    def tick() -> None:
        report.link.hear()
        table.tick()

    pack.hub.tick, pack.hub.news = tick, report.link.news
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
