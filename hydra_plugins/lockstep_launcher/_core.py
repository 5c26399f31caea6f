"""A launch: compose every job, plan, train in a worker, try again alone what the worker lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import (
    JobReturn,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lora_exp.config.overrides import parted
from lora_exp.config.sweeping import too_long
from lora_exp.config.validation import settled
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, OccupiedError
from lora_exp.files.lock import Lock
from lora_exp.lockstep.plan import Job, Plan, labels, plan, show
from lora_exp.lockstep.worker import Seats, Worker, failed, without_hydra
from lora_exp.record.contents import CHANGED, changed
from lora_exp.record.standing import doubt, doubted, mark, set_aside, standing
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
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    ours = set(launcher.config) >= GROUPS
    lock = Lock(Path(str(hydra.sweep.dir)), "hydra.sweep.dir") if ours else None
    worker = Worker(launcher.hydra_context, launcher.task_function, warm=ours)
    launched, at_once = _Launch(launcher), False
    try:
        common = _common(job_overrides)
        jobs = [
            _composed(launcher, list(overrides), initial_job_idx + i, ours, common)
            for i, overrides in enumerate(job_overrides)
        ]
        made = plan(jobs) if ours else Plan((), (), tuple((job, "") for job in jobs))
        if ours:
            _check_place(made, len(jobs), Path(str(hydra.sweep.dir)))
            show(made)
            refused = any(job.error for job, _ in made.at_once)
            write_command(Path(str(hydra.sweep.dir)), hydra, keep=refused)
        launched.run(made, {job.number: job for job in jobs}, worker)
    except KeyboardInterrupt as error:
        at_once = not isinstance(error, Interrupted)
        raise
    finally:
        worker.stop(at_once)
        launched.stopped()
        if lock is not None:
            lock.release()
        configure_log(hydra.hydra_logging, hydra.verbose)
    return [launched.returns[job.number] for job in jobs]


def _common(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys that all jobs of a sweep override alike."""
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return sorted(parted(override)[0] for override in shared)


def _composed(
    launcher: Any, overrides: list[str], number: int, ours: bool, common: list[str]
) -> Job:
    """Compose a job as every launcher does, and settle it as it will settle itself."""
    log.info("#%d : %s", number, " ".join(filter_overrides(overrides)))
    config: DictConfig = launcher.hydra_context.config_loader.load_sweep_config(
        launcher.config, overrides
    )
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
        if ours:  # Hydra's own word for keys that tell no job from another
            config.hydra.job.config.override_dirname.exclude_keys += common
    directory = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
    if faults := list(too_long(directory)):
        raise ConfigError(faults)
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(directory.absolute())
    try:
        master = launcher.config.hydra
        found = settled(without_hydra(config), config.hydra, master) if ours else None
    except LoraExpError as error:  # the job itself will say so too, in its own directory
        return Job(number, config, None, directory, tuple(overrides), error)
    return Job(number, config, found, directory, tuple(overrides))


def _check_place(made: Plan, count: int, folder: Path) -> None:
    """Refuse a launch into the directory of another sweep, before it writes anything there.

    Raises:
        ConfigError: a job's directory holds another run, or no job can run where a sweep lies.
    """
    refused = [(job, job.error) for job, _ in made.at_once if job.error is not None]
    held = [(job, error) for job, error in refused if isinstance(error, OccupiedError)]
    if held or (len(refused) == count and (folder / SUMMARY).is_file()):
        if SweepTable.current is not None:
            SweepTable.current.withdraw()
        raise ConfigError((f"job {job.number}", str(error)) for job, error in held or refused)


class _Launch:
    """What is known so far of a launch's jobs."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.jobs: dict[int, Job] = {}
        self.running: set[int] = set()
        self.returns: dict[int, JobReturn] = {}
        self.doubted: list[int] = []  # jobs that are not proven equal
        self.deaths = 0  # of workers that no running job can have caused

    def run(self, made: Plan, jobs: dict[int, Job], worker: Worker) -> None:
        """Carry a plan out, whatever the worker does."""
        self.jobs = jobs
        for job, _ in made.at_once:
            self.began(job.number)
            if job.error is not None and job.settled is not None:
                # what another run left in the directory stays untouched
                self.ended(job.number, failed(job.config, job.error))
            else:
                self.ended(job.number, self._here(job))
        hydra = self.launcher.config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)  # those jobs have set their own
        work = [_seats(pack) for pack in made.packs]
        alone = [job for job, _ in made.alone]
        for job in alone:
            self._set_aside(job)
        for job in [*alone, *(job for pack in made.packs for job in pack)]:
            _renew(job)
        self.train([*work, _alone(alone)], worker)
        self.retrain()

    def train(self, work: list[Seats], worker: Worker) -> None:
        """Send work; what a dead worker lost is tried again alone, once, then the rest goes on."""
        while work := [left for seats in work if (left := self._left(seats)).jobs]:
            try:
                worker.run(work, self)
            except LoraExpError as error:
                stop.check()
                lost = sorted(self.running)
                if not lost:  # it died before or between jobs: none of them is to blame
                    self.deaths += 1
                if self.deaths > 1:
                    raise
                log.warning("%s; to be tried again, alone: jobs %s", error, lost)
                for number in lost:
                    mark(self.jobs[number].directory, "interrupted", str(error))
                for number in lost:
                    self._again(number)
                    self.doubted = [other for other in self.doubted if other != number]
                    stop.check()
                worker.replace()
            else:
                if any(self._left(seats).jobs for seats in work):
                    raise Interrupted  # the worker alone was asked to stop, and has
                stop.check()
                return

    def stopped(self) -> None:
        """Mark the jobs that could not do so themselves, once nobody trains them any more."""
        for number in sorted(self.running):
            mark(self.jobs[number].directory, "interrupted", "stopped at once")

    def _set_aside(self, job: Job) -> None:
        """Make room for a job that is not proven equal and shall be trained anew."""
        lockstep: Any = job.config.get("lockstep")
        if lockstep and lockstep.on_difference == "retrain" and doubted(job.directory):
            log.error(
                "job %d is trained again, alone; %s keeps what it was",
                job.number, set_aside(job.directory),
            )  # fmt: skip

    def _again(self, number: int) -> None:
        job = self.jobs[number]
        if number in self.doubted:
            doubt(job.directory)
        self._set_aside(job)
        worker = Worker(self.launcher.hydra_context, self.launcher.task_function, warm=False)
        try:
            worker.run([_alone([job])], self)
        except LoraExpError as error:
            stop.check()
            text = f"{error}, also when it was tried again, alone"
            mark(job.directory, "failed", text)
            self.ended(number, failed(job.config, LoraExpError(text)))
        finally:
            worker.stop()

    def _left(self, seats: Seats) -> Seats:
        open_ = [n for n, _ in seats.jobs if n not in self.returns]
        kept = [self.jobs[number] for number in open_]
        return _alone(kept) if seats.mode is None else _seats(tuple(kept))

    def _here(self, job: Job) -> JobReturn:
        """Run a job that has nothing to train in this process."""
        context = self.launcher.hydra_context
        return run_job(
            hydra_context=HydraContext(context.config_loader, Callbacks()),
            task_function=self.launcher.task_function,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def began(self, number: int) -> None:
        """Tell Hydra's callbacks, which live in this process."""
        self.running.add(number)
        self.launcher.hydra_context.callbacks.on_job_start(
            config=self.jobs[number].config, task_function=self.launcher.task_function
        )

    def unproven(self, numbers: list[int], difference: str) -> None:
        """Mark jobs whose pack had a pass that was not the run alone."""
        log.error("lockstep: jobs %s are not proven equal to runs alone: %s", numbers, difference)
        self.doubted += [number for number in numbers if number not in self.doubted]
        for number in numbers:
            self._doubt(number)

    def _doubt(self, number: int) -> None:
        """Write it into the job's record and table; a job that trains will do so at its end."""
        if number not in self.running:
            try:
                doubt(self.jobs[number].directory)
            except (OSError, ValueError) as error:
                log.error("job %d cannot be marked: %s", number, error)
            if SweepTable.current is not None:
                SweepTable.current.doubt(self.jobs[number].directory)

    def retrain(self) -> None:
        """Train again, alone, what is not proven equal, if that is asked for."""
        again, self.doubted = self.doubted, []
        for number in again:
            self._doubt(number)
        for number in again:
            if self.jobs[number].config.lockstep.on_difference == "retrain":
                self._again(number)
                stop.check()

    def ended(self, number: int, result: JobReturn) -> None:
        """Keep a job's result and tell Hydra's callbacks."""
        self.running.discard(number)
        self.returns[number] = result
        self.launcher.hydra_context.callbacks.on_job_end(
            config=self.jobs[number].config, job_return=result
        )


def _renew(job: Job) -> None:
    """Make room for a finished job that is trained again, since its files have changed."""
    if job.settled is not None and standing(job.directory, job.settled) == "finished":
        names = ", ".join(changed(job.directory, job.settled))
        text = "job %d is trained again, since %s changed; %s keeps what it was"
        log.warning(text, job.number, names, set_aside(job.directory, CHANGED))


def _seats(jobs: tuple[Job, ...]) -> Seats:
    configs = tuple((job.number, job.config) for job in jobs)
    lockstep: Any = (
        jobs[0].config.lockstep if jobs else OmegaConf.create({"mode": "exact", "verify": 0})
    )
    return Seats(
        configs,
        lockstep.mode,
        lockstep.get("max_jobs"),
        tuple(labels(jobs).values()),
        lockstep.verify,
    )


def _alone(jobs: list[Job]) -> Seats:
    return Seats(tuple((job.number, job.config) for job in jobs), None, None)
