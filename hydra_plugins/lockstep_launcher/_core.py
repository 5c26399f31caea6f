"""A launch: compose every job, plan, and train the plan in workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals

from hydra_plugins.lockstep_launcher._composition import common_keys, composed_job
from hydra_plugins.lockstep_launcher._jobs import Jobs
from lora_exp.errors import ConfigError, Interrupted, OccupiedError
from lora_exp.files.lock import Lock
from lora_exp.lockstep.brackets import brackets, earlier_jobs, forecasts, stopped_before
from lora_exp.lockstep.devices import environments, where
from lora_exp.lockstep.plan import Plan, plan, show
from lora_exp.lockstep.workers import Workers
from lora_exp.record.sweep import SUMMARY, write_command

GROUPS = {"model", "quant", "peft", "algorithm", "lockstep"}


def launch(
    launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> list[JobReturn]:
    """Run the jobs of a sweep; see `LockstepLauncher`."""
    setup_globals()
    ours = set(launcher.config) >= GROUPS
    settings = environments(launcher.workers if ours else 1)
    hydra = launcher.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    folder = Path(str(hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, "hydra.sweep.dir") if ours else None
    workers = launcher.kept
    if workers is None:
        workers = Workers(launcher.hydra_context, launcher.task_function, ours, settings)
    launcher.kept = None
    state, stop_immediately = Jobs(launcher), False
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
            lines = forecasts(brackets([*state.earlier, *jobs], {}), initial_job_idx)
            show(launch_plan, [*lines, *where(launch_plan.training, settings)])
            refused = any(job.error for job, _ in launch_plan.without_training)
            write_command(folder, hydra, keep=refused)
        state.run(launch_plan, {job.number: job for job in jobs}, workers)
        if launcher.keeps_workers:
            launcher.kept = workers
    except KeyboardInterrupt as error:
        stop_immediately = not isinstance(error, Interrupted)
        raise
    finally:
        if launcher.kept is None:
            workers.stop(stop_immediately)
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
