"""A launch: compose every job, plan, train in a worker, retry alone what a dead worker lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import (
    JobReturn,
    configure_log,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext

from hydra_plugins.lockstep_launcher._jobs import common_keys, composed_job
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, OccupiedError, Paused
from lora_exp.files.lock import Lock
from lora_exp.lockstep.brackets import (
    brackets,
    earlier_jobs,
    ended_before,
    forecasts,
    stopped_before,
)
from lora_exp.lockstep.plan import Job, Plan, plan, show
from lora_exp.lockstep.work import Work, apart, together
from lora_exp.lockstep.worker import Worker, failed, returned
from lora_exp.record.contents import CHANGED, changed_files
from lora_exp.record.standing import (
    how_ended,
    is_unproven,
    mark_unproven,
    objective_value,
    run_status,
    set_aside,
    write_status,
)
from lora_exp.record.sweep import SUMMARY, SweepTable, write_command
from lora_exp.training.interruption import stop

log = logging.getLogger(__name__)
GROUPS = {"model", "quant", "peft", "algorithm", "lockstep"}


def launch(
    launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> list[JobReturn]:
    """Run the jobs of a sweep; see `LockstepLauncher`."""
    setup_globals()
    hydra = launcher.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    folder = Path(str(hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    ours = set(launcher.config) >= GROUPS
    lock = Lock(folder, "hydra.sweep.dir") if ours else None
    worker = Worker(launcher.hydra_context, launcher.task_function, warm=ours)
    state, stop_immediately = _Launch(launcher), False
    try:
        common = common_keys(job_overrides)
        jobs = [
            composed_job(launcher, list(overrides), initial_job_idx + i, ours, common)
            for i, overrides in enumerate(job_overrides)
        ]
        launch_plan = Plan((), (), tuple((job, "") for job in jobs))
        if ours:
            state.earlier = earlier_jobs(folder, initial_job_idx)
            launch_plan = plan(jobs, stopped_before(jobs, state.earlier))
            # after a launch's first batch the summary is its own
            holds_sweep = initial_job_idx == 0 and (folder / SUMMARY).is_file()
            _check_sweep_dir(launch_plan, len(jobs), holds_sweep)
            show(launch_plan, forecasts(brackets([*state.earlier, *jobs], {}), initial_job_idx))
            refused = any(job.error for job, _ in launch_plan.without_training)
            write_command(folder, hydra, keep=refused)
        state.run(launch_plan, {job.number: job for job in jobs}, worker)
    except KeyboardInterrupt as error:
        stop_immediately = not isinstance(error, Interrupted)
        raise
    finally:
        worker.stop(stop_immediately)
        state.stopped()
        if lock is not None:
            lock.release()
        configure_log(hydra.hydra_logging, hydra.verbose)
    return [state.returns[job.number] for job in jobs]


def _check_sweep_dir(launch_plan: Plan, count: int, holds_sweep: bool) -> None:
    """Refuse a launch into the directory of another sweep, before it writes anything there.

    Raises:
        ConfigError: a job's directory holds another run, or no job can run and there is a sweep.
    """
    refused = [(job, job.error) for job, _ in launch_plan.without_training if job.error is not None]
    occupied = [(job, error) for job, error in refused if isinstance(error, OccupiedError)]
    if occupied or (len(refused) == count and holds_sweep):
        raise ConfigError((f"job {job.number}", str(error)) for job, error in occupied or refused)


class _Launch:
    """The state of a launch: which jobs are running, ended or not proven equal.

    `Worker.run` calls `began`, `ended` and `unproven`, by the names in the worker's messages.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.jobs: dict[int, Job] = {}
        self.running: set[int] = set()
        self.returns: dict[int, JobReturn] = {}
        self.unproven_jobs: list[int] = []  # not proven equal to runs alone
        self.brackets: dict[int, Bracket] = {}
        self.earlier: list[Job] = []  # those of a sweep's earlier launches
        self.paused: set[int] = set()  # they wait at a rung for other jobs
        self.deaths = 0  # of workers, while no job was running

    def run(self, launch_plan: Plan, jobs: dict[int, Job], worker: Worker) -> None:
        """Carry out a plan, even if workers die."""
        self.jobs = jobs
        for job, _ in launch_plan.without_training:
            self.began(job.number)
            if job.error is not None and (job.directory / "run.json").is_file():
                # the run in the directory is another one: its files stay unchanged
                self.ended(job.number, failed(job.config, job.error))
            elif job.settled is not None and how_ended(job.directory)[0] == "pruned":
                self.ended(job.number, returned(job.config, objective_value(job.directory)))
            else:
                self.ended(job.number, self._run_here(job))
        hydra = self.launcher.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)  # these jobs have changed it
        alone = [job for job, _ in launch_plan.alone]
        for job in alone:
            self._set_aside(job)
        for job in [*alone, *(job for pack in launch_plan.packs for job in pack)]:
            _set_aside_changed(job)
        self.train(launch_plan, worker)
        self.retrain()

    def train(self, launch_plan: Plan, worker: Worker) -> None:
        """Send work; the running jobs of a dead worker are retried alone, once, then the rest.

        Jobs that wait for others at a rung have paused; they are sent again when all have ended
        or paused.
        """
        while work := self._work(launch_plan):
            try:
                worker.run(work, self)
            except LoraExpError as error:
                stop.check()
                lost = sorted(self.running)
                if not lost:  # it died before or between jobs: no job is the cause
                    self.deaths += 1
                if self.deaths > 1:
                    raise
                log.warning("%s; to be tried again, alone: jobs %s", error, lost)
                for number in lost:
                    write_status(self.jobs[number].directory, "interrupted", str(error))
                for number in lost:
                    self._retryapart(number)
                    self.unproven_jobs = [n for n in self.unproven_jobs if n != number]
                    stop.check()
                worker.replace()
                self.brackets = {}  # what had paused is sent again, although nothing is new
            else:
                stop.check()
                if any(n not in self.paused for part in work for n in self._unfinished(part)):
                    raise Interrupted  # only the worker was asked to stop, and did

    def stopped(self) -> None:
        """Mark the jobs that were running as interrupted, after the worker has ended."""
        for number in sorted(self.running):
            write_status(self.jobs[number].directory, "interrupted", "stopped at once")

    def _set_aside(self, job: Job) -> None:
        """Set a job's directory aside if it is not proven equal and is to be trained anew."""
        lockstep: Any = job.config.get("lockstep")
        if lockstep and lockstep.on_difference == "retrain" and is_unproven(job.directory):
            log.error(
                "job %d is trained again, alone; %s keeps what it was",
                job.number, set_aside(job.directory),
            )  # fmt: skip

    def _retryapart(self, number: int) -> None:
        job = self.jobs[number]
        if number in self.unproven_jobs:
            mark_unproven(job.directory)
        self._set_aside(job)
        worker = Worker(self.launcher.hydra_context, self.launcher.task_function, warm=False)
        try:
            worker.run([apart([job], self._brackets())], self)
        except LoraExpError as error:
            stop.check()
            text = f"{error}, also when it was tried again, alone"
            write_status(job.directory, "failed", text)
            self.ended(number, failed(job.config, LoraExpError(text)))
        finally:
            worker.stop()

    def _work(self, launch_plan: Plan) -> list[Work]:
        """Return the jobs that have not ended, with what is known of those to compare them with.

        Raises:
            LoraExpError: all jobs have paused, and none had reported anything new.
        """
        earlier, self.brackets = self.brackets, self._brackets()
        if self.paused and self.brackets == earlier:
            raise LoraExpError(f"jobs {sorted(self.paused)} wait for each other's rungs")
        packs = [
            [job for job in pack if job.number not in self.returns] for pack in launch_plan.packs
        ]
        alone = [job for job, _ in launch_plan.alone if job.number not in self.returns]
        work = [together(pack, self.brackets) for pack in packs if pack]
        return [*work, apart(alone, self.brackets)] if alone else work

    def _brackets(self) -> dict[int, Bracket]:
        results = {n: result._return_value for n, result in self.returns.items()}
        failed = {n: isinstance(value, Exception) for n, value in results.items()}
        ended = dict.fromkeys((job.number for job in self.earlier), False)
        ended |= ended_before(self.earlier) | failed
        return brackets([*self.earlier, *self.jobs.values()], ended)

    def _unfinished(self, part: Work) -> list[int]:
        return [number for number, _ in part.jobs if number not in self.returns]

    def _run_here(self, job: Job) -> JobReturn:
        """Run a job that needs no training, in this process."""
        context = self.launcher.hydra_context
        return run_job(
            hydra_context=HydraContext(context.config_loader, Callbacks()),
            task_function=self.launcher.task_function,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def began(self, number: int) -> None:
        """Call Hydra's callbacks, which are in this process."""
        self.running.add(number)
        if number in self.paused:
            self.paused.discard(number)
            return
        self.launcher.hydra_context.callbacks.on_job_start(
            config=self.jobs[number].config, task_function=self.launcher.task_function
        )

    def unproven(self, numbers: list[int], difference: str) -> None:
        """Mark jobs whose pack had a pass that differed from the run alone."""
        log.error("lockstep: jobs %s are not proven equal to runs alone: %s", numbers, difference)
        self.unproven_jobs += [n for n in numbers if n not in self.unproven_jobs]
        for number in numbers:
            self._mark_unproven(number)

    def _mark_unproven(self, number: int) -> None:
        """Mark an ended job in its record and table; a running job does so at its end."""
        if number not in self.running:
            try:
                mark_unproven(self.jobs[number].directory)
            except (OSError, ValueError) as error:
                log.error("job %d cannot be marked: %s", number, error)
            if SweepTable.current is not None:
                SweepTable.current.mark_unproven(self.jobs[number].directory)

    def retrain(self) -> None:
        """Retrain alone the jobs that are not proven equal, if the config requests it."""
        numbers, self.unproven_jobs = self.unproven_jobs, []
        for number in numbers:
            self._mark_unproven(number)
        for number in numbers:
            if self.jobs[number].config.lockstep.on_difference == "retrain":
                self._retryapart(number)
                stop.check()

    def ended(self, number: int, result: JobReturn) -> None:
        """Keep a job's result and call Hydra's callbacks."""
        self.running.discard(number)
        if isinstance(result._return_value, Paused):
            self.paused.add(number)
            return
        self.returns[number] = result
        self.launcher.hydra_context.callbacks.on_job_end(
            config=self.jobs[number].config, job_return=result
        )


def _set_aside_changed(job: Job) -> None:
    """Set aside the directory of a finished job that is trained again: its files have changed."""
    if job.settled is not None and run_status(job.directory, job.settled) == "finished":
        names = ", ".join(changed_files(job.directory, job.settled))
        text = "job %d is trained again, since %s changed; %s keeps what it was"
        log.warning(text, job.number, names, set_aside(job.directory, CHANGED))
