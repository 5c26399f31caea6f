"""A worker's own side: the process in which jobs train, pack after pack.

It is forked from the launcher, which has not imported torch: so it has the task, its resolvers and
plugins, but no GPU state.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lora_exp import libraries
from lora_exp.child import end_with_parent
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import DivergedError, Interrupted, LoraExpError, Paused
from lora_exp.lockstep.events import EventFile
from lora_exp.lockstep.job import failed, run_in_pack
from lora_exp.lockstep.link import Link
from lora_exp.lockstep.plan import Job
from lora_exp.lockstep.work import Work
from lora_exp.record.standing import how_ended
from lora_exp.training.interruption import stop
from lora_exp.training.place import Alone, here

STATUSES = {
    DivergedError: "diverged", Paused: "paused", Interrupted: "interrupted", Exception: "failed",
}  # fmt: skip
# packages whose errors can be sent to the launcher
SENDABLE = ("builtins", "lora_exp", "hydra", "omegaconf")


def serve(
    pipe: Connection,
    launchers_ends: Iterable[Connection],
    launcher: int,
    context: HydraContext,
    task: TaskFunction,
    warm: bool,
    feeds: bool,
) -> None:
    """Be a worker: run what comes through the pipe, until the launcher has no more.

    Args:
        pipe: this worker's end.
        launchers_ends: of all workers' pipes; a copy would keep them open after the launcher's end.
        launcher: its process id.
        context: the launcher's.
        task: what runs a job.
        warm: whether to import torch while the launcher still composes.
        feeds: whether the launcher shows the jobs' progress, since there are other workers.
    """
    stop.inherited()
    end_with_parent(launcher)
    for end in launchers_ends:
        end.close()
    # the launcher's callbacks stay with the launcher
    context = HydraContext(config_loader=context.config_loader, callbacks=Callbacks())
    try:
        with stop.listening():
            _run_all(Link(pipe), context, task, warm, feeds)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(130)  # interrupted, or the launcher has ended: the records are complete


def _run_all(
    link: Link, context: HydraContext, task: TaskFunction, warm: bool, feeds: bool
) -> None:
    if warm:
        libraries.load(freeze=True)
        import lora_exp.experiment
        import lora_exp.lockstep.seat  # noqa: F401  (while the launcher composes)
    work = link.work()
    while work is not None:
        carry_out(work, link, context, task, feeds)
        link.send("over")
        if (work := link.work()) is not None:  # half a second: not if the process ends now
            gc.unfreeze()  # free the pack before, and its base
            gc.collect()


def carry_out(
    work: Work,
    link: Link | EventFile,
    context: HydraContext,
    task: TaskFunction,
    feeds: bool = False,
) -> None:
    """Run the jobs of some work, and send their events.

    Args:
        work: of this process.
        link: to the launcher.
        context: Hydra's, without the launcher's callbacks.
        task: what runs a job.
        feeds: whether the launcher shows their progress.
    """
    link.join(work.brackets.values())
    report = _Report(link, context, task, work.brackets, feeds)
    if work.mode is not None:
        _train_pack(work, report)
    else:
        _train_apart(work, report)


def _train_apart(work: Work, report: _Report) -> None:
    from lora_exp.lockstep.table import FedRow, Feed, Row

    rows = [Row(*pair) for pair in work.labelled]
    feed = Feed(rows, [0], report.link.send) if report.feeds else None
    with feed.open() if feed else nullcontext():
        for row, job in zip(rows, work.jobs, strict=True):
            bracket, board = work.brackets.get(job.number), FedRow(row, feed) if feed else None
            here.set(Alone(job.number, bracket, report.link.news, settled=job.settled, board=board))
            result = report.run(job)
            if feed:
                feed.ended(row, *_ended(result))


@dataclass
class _Report:
    link: Link | EventFile
    context: HydraContext
    task: TaskFunction
    brackets: Mapping[int, Bracket]
    feeds: bool

    def run(self, job: Job, in_pack: bool = False) -> JobReturn:
        """Run one job as every launcher does, and send the result."""
        number, config = job.number, job.config
        if stop.asked:
            return failed(config, Interrupted())  # it has not begun
        self.link.send("began", number)
        try:
            result = run_in_pack(config, self.task) if in_pack else self._run_alone(config)
        except Interrupted as error:  # the others stop at the end of their own step
            result = failed(config, error)
        except Exception as error:  # Hydra's errors, before or after the task
            result = failed(config, error)
        value = result._return_value
        if number in self.brackets and not isinstance(value, Interrupted):
            self.brackets[number].end(number, failed=isinstance(value, Exception))
        self.link.send("ended", number, portable(result))
        return result

    def _run_alone(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def portable(result: JobReturn) -> JobReturn:
    """Return a job's result in a form that can be sent: errors of other packages as text.

    To unpickle torch's errors the launcher would have to import torch; others cannot be pickled.
    """
    value = result._return_value
    if isinstance(value, Exception) and type(value).__module__.split(".")[0] not in SENDABLE:
        result._return_value = LoraExpError(f"{type(value).__name__}: {value}")
    return result


def _train_pack(work: Work, report: _Report) -> None:
    libraries.load(freeze=True)
    from lora_exp.lockstep.pack import Pack
    from lora_exp.lockstep.seat import Seat
    from lora_exp.lockstep.table import Feed, Row, Table
    from lora_exp.model.memory import keep_freed

    keep_freed()
    rows = [Row(*pair) for pair in work.labelled]
    pack = Pack(work.mode or "exact", work.max_jobs, work.verify, memory_share=work.memory_share)
    tokens = pack.passes.trained_tokens
    table: Table | Feed = Table("in lockstep", rows, tokens)
    if report.feeds:
        table = Feed(rows, tokens, report.link.send)

    def seated(index: int, job: Job) -> Callable[[], None]:
        def run() -> None:
            bracket = work.brackets.get(job.number)
            here.set(Seat(pack, index, rows[index], job.number, bracket, job.settled))
            result = report.run(job, in_pack=True)
            table.ended(rows[index], *_ended(result))

        return run

    def report_difference(indices: list[int], difference: str) -> None:
        report.link.send("unproven", [work.jobs[index].number for index in indices], difference)

    pack.passes.verification.on_difference = report_difference

    def tick() -> None:
        report.link.hear()
        table.tick()

    pack.hub.tick, pack.hub.news = tick, report.link.news
    with table.open():
        pack.hub.run(seated(index, job) for index, job in enumerate(work.jobs))


def _ended(result: JobReturn) -> tuple[str, str]:
    """Return how a job ended, as in run.json, and why it ended early, if it did."""
    returned = result._return_value
    for kind, status in STATUSES.items():
        if isinstance(returned, kind):
            return status, ""
    directory = Path(str(result.hydra_cfg.hydra.runtime.output_dir))  # type: ignore[union-attr]
    status, reason = how_ended(directory)
    return status or "finished", reason  # a task that is not ours has no record
