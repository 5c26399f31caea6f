"""The jobs of a launch while they train: running, paused, ended, or not proven equal."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, configure_log, run_job
from hydra.types import HydraContext

from lora_exp.comparison.live import LiveReport
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import Interrupted, LoraExpError, Paused
from lora_exp.lockstep.brackets import brackets, stopped_before
from lora_exp.lockstep.cluster import Cluster
from lora_exp.lockstep.job import failed, returned
from lora_exp.lockstep.plan import Job, Plan, labels
from lora_exp.lockstep.work import Work, apart, dealt
from lora_exp.lockstep.workers import DiedError, Workers
from lora_exp.record.contents import CHANGED, changed_files
from lora_exp.record.standing import (
    FAILED,
    how_ended,
    is_unproven,
    mark_unproven,
    objective_value,
    set_aside,
    write_status,
)
from lora_exp.record.sweep import SweepTable
from lora_exp.training.interruption import stop

Executor = Workers | Cluster
log = logging.getLogger(__name__)


class Jobs:
    """The jobs of a launch, and what is known of each.

    `Workers.run` calls `began`, `ended` and `unproven`, by the names in the workers' messages.
    """

    def __init__(self, launcher: Any, ours: bool) -> None:
        """Create it.

        Args:
            launcher: Hydra's.
            ours: whether the jobs are runs of lora-exp, of which a report can be written.
        """
        self.launcher = launcher
        config = launcher.config
        self.report = LiveReport(
            Path(str(config.hydra.sweep.dir)), config.get("report") if ours else None
        )
        self.jobs: dict[int, Job] = {}
        self.running: set[int] = set()
        self.returns: dict[int, JobReturn] = {}
        self.unproven_jobs: list[int] = []  # not proven equal to runs alone
        self.brackets: dict[int, Bracket] = {}
        self.earlier: list[Job] = []  # those of a sweep's earlier launches
        self.paused: set[int] = set()  # they wait at a rung for other jobs
        self.alone: set[int] = set()  # they have a base to themselves
        self.deaths = 0  # of workers, while no job was running

    def run(self, launch_plan: Plan, jobs: dict[int, Job], workers: Executor) -> None:
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
        self.train(launch_plan, workers)
        self.retrain(workers)

    def train(self, launch_plan: Plan, workers: Executor) -> None:
        """Send work; the running jobs of dead workers are retried alone, once, then the rest.

        Jobs that wait for others at a rung have paused; they are sent again when all have ended
        or paused.
        """
        while work := self._work(launch_plan, workers.count):
            try:
                workers.run(work, self)
            except DiedError as error:
                stop.check()
                lost = error.jobs
                if not lost:  # it died before or between jobs: no job is the cause
                    self.deaths += 1
                if self.deaths > 1:
                    raise
                log.warning("%s%s", error, f"; to be tried again, alone: jobs {lost}" * bool(lost))
                for number, reason in error.reasons.items():
                    write_status(self.jobs[number].directory, "interrupted", reason)
                workers.replace()
                self._retry_alone(lost, workers)
                self.brackets = {}  # what had paused is sent again, although nothing is new
            else:
                stop.check()
                if any(self._is_interrupted(job.number) for part in work for job in part.jobs):
                    raise Interrupted  # only the worker was asked to stop, and did

    def stopped(self) -> None:
        """Mark the jobs that were running as interrupted, after the worker has ended."""
        self.report.stop()
        for number in sorted(self.running):
            write_status(self.jobs[number].directory, "interrupted", "stopped at once")

    def _set_aside(self, job: Job) -> None:
        """Set a job's directory aside if it is not proven equal and is to be trained anew."""
        if _retrains(job) and is_unproven(job.directory):
            log.error(
                "job %d is trained again, alone; the earlier run is now %s",
                job.number, set_aside(job.directory),
            )  # fmt: skip

    def _retry_alone(self, numbers: list[int], workers: Executor) -> None:
        """Try jobs of dead workers once more: where memory is shared one after the other."""
        for number in numbers:
            if number in self.unproven_jobs:
                mark_unproven(self.jobs[number].directory)
            self._set_aside(self.jobs[number])
        self.unproven_jobs = [n for n in self.unproven_jobs if n not in numbers]
        names = labels(self.jobs.values())
        for batch in [[n] for n in numbers] if workers.shares_memory else [numbers]:
            brackets = self._brackets()
            work = [replace(apart([self.jobs[n]], brackets), names=(names[n],)) for n in batch]
            try:
                workers.run(work, self)
            except DiedError as error:
                stop.check()
                for number, reason in (error.reasons or dict.fromkeys(batch, str(error))).items():
                    text = f"{reason}, also when it was tried again, alone"
                    write_status(self.jobs[number].directory, "failed", text)
                    self.ended(number, failed(self.jobs[number].config, LoraExpError(text)))
                workers.replace()
            stop.check()

    def _work(self, launch_plan: Plan, workers: int | None) -> list[Work]:
        """Return the jobs that have not ended, with what is known of those to compare them with.

        Raises:
            LoraExpError: all jobs have paused, and none had reported anything new.
        """
        earlier, self.brackets = self.brackets, self._brackets()
        if self.paused and self.brackets == earlier:
            text = f"jobs {sorted(self.paused)} wait for each other at a rung: a fault of lora-exp"
            raise LoraExpError(f"{text}; the same command with early_stopping=none goes on")
        anew = {n for n in self.unproven_jobs if n in self.paused and self._set_unproven_aside(n)}
        self.unproven_jobs = [n for n in self.unproven_jobs if n not in anew]
        self.alone |= anew | {job.number for job, _ in launch_plan.alone}
        planned = [*launch_plan.packs, [job for job, _ in launch_plan.alone]]
        left = [[job for job in jobs if job.number not in self.returns] for jobs in planned]
        packs = [[job for job in jobs if job.number not in self.alone] for jobs in left]
        alone = [job for jobs in left for job in jobs if job.number in self.alone]
        # a copy: reports are added to it while the work is done
        return dealt(packs, alone, copy.deepcopy(self.brackets), workers)

    def _brackets(self) -> dict[int, Bracket]:
        results = {n: result._return_value for n, result in self.returns.items()}
        failed = {n: isinstance(value, Exception) for n, value in results.items()}
        earlier = {job.number: how_ended(job.directory)[0] in FAILED for job in self.earlier}
        return brackets([*self.earlier, *self.jobs.values()], earlier | failed)

    def _is_interrupted(self, number: int) -> bool:
        """Return whether a job of a round that is over was interrupted, or has not begun."""
        if number not in self.returns:
            return number not in self.paused
        return isinstance(self.returns[number]._return_value, Interrupted)

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

    def retrain(self, workers: Executor) -> None:
        """Retrain alone the jobs that are not proven equal, if the config requests it.

        Then jobs go on that were stopped only because of what an unproven one had reported.
        """
        numbers, self.unproven_jobs = self.unproven_jobs, []
        for number in numbers:
            self._mark_unproven(number)
        # all first, so that none is compared with an unproven report
        anew = [number for number in numbers if self._set_unproven_aside(number)]
        if anew:
            self._train_alone(anew, workers)
            stopped = stopped_before(list(self.jobs.values()), self.earlier)
            pruned = [n for n, job in self.jobs.items() if how_ended(job.directory)[0] == "pruned"]
            self._train_alone([n for n in pruned if n not in stopped], workers)

    def _set_unproven_aside(self, number: int) -> bool:
        """Set an ended or paused job aside if it is to be retrained; return whether it is."""
        job = self.jobs[number]
        if not _retrains(job):
            return False
        self._mark_unproven(number)
        self._set_aside(job)
        self.returns.pop(number, None)
        self.paused.discard(number)
        return True

    def _train_alone(self, numbers: list[int], workers: Executor) -> None:
        for number in numbers:
            self.returns.pop(number, None)
        self.train(Plan((), (), tuple((self.jobs[number], "") for number in numbers)), workers)

    def ended(self, number: int, result: JobReturn) -> None:
        """Keep a job's result and call Hydra's callbacks."""
        job = self.jobs[number]
        self.running.discard(number)
        if isinstance(result._return_value, Paused):
            self.paused.add(number)
            job.forget_config()
            return
        self.returns[number] = result
        self.launcher.hydra_context.callbacks.on_job_end(config=job.config, job_return=result)
        job.forget_config()
        is_pruned = how_ended(job.directory)[0] == "pruned"
        self.report.refresh(after_rung=is_pruned)


def _retrains(job: Job) -> bool:
    """Return whether a job that is not proven equal is to be trained again."""
    return job.values is not None and job.values.lockstep.on_difference == "retrain"


def _set_aside_changed(job: Job) -> None:
    """Set aside the directory of an ended job that is trained again, if its files have changed."""
    if job.status not in ("finished", "pruned"):
        return
    if names := changed_files(job.directory, job.settled):  # type: ignore[arg-type]
        text = "job %d is trained again, since %s changed; the earlier run is now %s"
        log.warning(text, job.number, ", ".join(names), set_aside(job.directory, CHANGED))
