"""The worker: the process in which a plan's jobs train, pack after pack.

It is forked from the launcher, which has not imported torch: the task, its resolvers and plugins
are there, and nothing of a GPU is.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lora_exp.errors import LoraExpError

Config = tuple[int, DictConfig]


@dataclass(frozen=True)
class Seats:
    """Jobs that share a base, and how; `mode` None: each has the process to itself."""

    jobs: tuple[Config, ...]
    mode: str | None
    max_jobs: int | None
    names: tuple[str, ...] = ()


class Worker:
    """The launcher's side: a process that is sent work, and tells what became of it."""

    def __init__(self, context: HydraContext, task: TaskFunction, warm: bool) -> None:
        self.arguments = (context, task, warm)
        self.replace()

    def replace(self) -> None:
        """Start a process, the first or one for another that died."""
        fork = get_context("fork")
        self.pipe, theirs = fork.Pipe()
        arguments = (theirs, self.pipe, *self.arguments)
        self.process = fork.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def run(
        self, work: list[Seats], began: Callable[[int], None], ended: Callable[..., None]
    ) -> None:
        """Send work and report each job as it begins and ends, until all have or the worker died.

        Raises:
            LoraExpError: it died; what had begun and not ended was lost with it.
        """
        self.pipe.send(work)
        while True:
            wait([self.pipe, self.process.sentinel])
            try:
                said, *about = self.pipe.recv() if self.pipe.poll() else (None,)
            except EOFError:
                said = None
            if said is None:
                self.process.join()
                raise LoraExpError(f"the worker was {_ending(self.process.exitcode or 0)}")
            if said == "over":
                return
            (began if said == "began" else ended)(*about)

    def stop(self) -> None:
        """Let the process go; one that still works gets time to leave its records in order."""
        self.pipe.close()
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is memory short? lockstep.max_jobs=... takes fewer)" if code == -9 else ""
        return f"killed by {name}{hint}"
    return f"gone with exit code {code}"


def _work(
    pipe: Connection, theirs: Connection, context: HydraContext, task: TaskFunction, warm: bool
) -> None:
    theirs.close()  # else the launcher's end would stay open in here when the launcher is gone
    # the launcher's callbacks stay with the launcher
    context = HydraContext(config_loader=context.config_loader, callbacks=Callbacks())
    if warm:
        import lora_exp.experiment
        import lora_exp.lockstep.seat  # noqa: F401  (while the launcher composes)
    try:
        for seats in pipe.recv():
            report = _Report(pipe, context, task)
            if seats.mode is None:
                for number, config in seats.jobs:
                    report.run(number, config)
            else:
                _pack(seats, report)
        pipe.send(("over",))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(130)  # interrupted, or the launcher is gone: records are in order, say no more


@dataclass
class _Report:
    pipe: Connection
    context: HydraContext
    task: TaskFunction

    def run(self, number: int, config: DictConfig) -> JobReturn:
        """Run one job as every launcher does, and send what it returned."""
        self.pipe.send(("began", number))
        try:
            result = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Exception as error:  # Hydra's own, before or after the task
            result = failed(config, error)
        self.pipe.send(("ended", number, portable(result)))
        return result


def failed(config: DictConfig, error: Exception) -> JobReturn:
    """Return what Hydra would have returned of a job, had it been able to."""
    result = JobReturn()
    result.cfg = config.copy()
    with read_write(result.cfg), open_dict(result.cfg):
        del result.cfg["hydra"]
    result.hydra_cfg = OmegaConf.masked_copy(config, "hydra")
    result.overrides = list(config.hydra.overrides.task)
    result.working_dir, result.task_name = str(Path.cwd()), config.hydra.job.name
    result.return_value, result.status = error, JobStatus.FAILED
    return result


def portable(result: JobReturn) -> JobReturn:
    """Return a job's result as it can be sent: an error that cannot be pickled as its text."""
    try:
        pickle.loads(pickle.dumps(result))
    except Exception:
        value = result._return_value
        text = f"{type(value).__name__}: {value}"
        result._return_value = LoraExpError(text) if isinstance(value, Exception) else None
    return result


def _pack(seats: Seats, report: _Report) -> None:
    import gc

    from lora_exp.lockstep.pack import Pack
    from lora_exp.lockstep.seat import Seat
    from lora_exp.lockstep.table import Row, Table
    from lora_exp.memory import keep_freed
    from lora_exp.place import here

    keep_freed()
    launcher = os.getppid()
    rows = [Row(n, name) for (n, _), name in zip(seats.jobs, seats.names, strict=True)]
    pack = Pack(seats.mode or "exact", seats.max_jobs)
    table = Table("in lockstep", rows, pack.counted)

    def tick() -> None:
        table.tick()
        if os.getppid() != launcher:
            raise KeyboardInterrupt  # nobody waits for the results

    def job(place: int, number: int, config: DictConfig) -> Callable[[], None]:
        def run() -> None:
            here.set(Seat(pack, place, rows[place]))
            result = report.run(number, config)
            bad = isinstance(result._return_value, Exception)
            table.ended(rows[place], "failed" if bad else "finished")

        return run

    pack.hub.tick = tick
    with table.open():
        pack.hub.run(job(place, *about) for place, about in enumerate(seats.jobs))
    gc.unfreeze()
    gc.collect()
