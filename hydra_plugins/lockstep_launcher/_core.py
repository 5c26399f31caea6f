"""A launch: compose every job, plan, and train the plan in workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals

from hydra_plugins.lockstep_launcher._composition import composed_jobs, in_processes
from hydra_plugins.lockstep_launcher._jobs import Executor, Jobs
from hydra_plugins.lockstep_launcher.config import RayConfig, SlurmConfig
from lora_exp.errors import ConfigError, Interrupted, OccupiedError, did_you_mean
from lora_exp.files.lock import Lock
from lora_exp.lockstep.brackets import brackets, earlier_jobs, forecasts, stopped_before
from lora_exp.lockstep.cluster import Cluster
from lora_exp.lockstep.devices import environments, one_worker, where
from lora_exp.lockstep.engine import Engine
from lora_exp.lockstep.plan import Plan, plan, show
from lora_exp.lockstep.ray import Ray
from lora_exp.lockstep.slurm import Slurm
from lora_exp.lockstep.workers import Workers
from lora_exp.record.sweep import SUMMARY, write_command

ENGINES: dict[str, Callable[[Mapping[str, Any]], Engine]] = {"slurm": Slurm, "ray": Ray}
DEFAULTS: dict[str, Any] = {"slurm": asdict(SlurmConfig()), "ray": asdict(RayConfig())}
KEY = "hydra.launcher.executor"
GROUPS = {"model", "quant", "peft", "algorithm", "lockstep", "parallel"}


def launch(
    launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> list[JobReturn]:
    """Run the jobs of a sweep; see `LockstepLauncher`."""
    setup_globals()
    ours = set(launcher.config) >= GROUPS
    several = ours and in_processes(launcher, job_overrides)
    hydra = launcher.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    folder = Path(str(hydra.sweep.dir))
    is_local = _is_local(launcher, ours)
    count = one_worker(launcher.workers, several) if ours and is_local else 1
    settings = environments(count)
    engine = None if is_local or launcher.kept else _engine(launcher)
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, "hydra.sweep.dir") if ours else None
    workers = launcher.kept or _executor(launcher, engine, ours, settings)
    launcher.kept = None
    state, stop_immediately = Jobs(launcher, ours), False
    try:
        jobs = composed_jobs(launcher, job_overrides, initial_job_idx, ours)
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


def _is_local(launcher: Any, ours: bool) -> bool:
    """Return whether a launch trains on this machine, without an engine.

    Raises:
        ConfigError: there is no such executor, or it cannot run this task.
    """
    executors = ("local", *ENGINES)
    if launcher.executor not in executors:
        text = f"there is no {launcher.executor!r}{did_you_mean(launcher.executor, executors)}"
        raise ConfigError([(KEY, f"{text}; there are {', '.join(executors)}")])
    if launcher.executor == "local":
        return True
    if not ours:
        text = f"{launcher.executor} trains runs of lora-exp, and this task is another"
        raise ConfigError([(KEY, text)])
    if launcher.workers is not None and launcher.workers < 1:
        raise ConfigError([("hydra.launcher.workers", f"{launcher.workers} is not above 0")])
    return False


def _engine(launcher: Any) -> Engine:
    """Return the cluster on which a launch trains.

    Raises:
        ConfigError: a value is wrong, or another executor's; or the cluster does not answer.
        ExtraError: its package is missing.
    """
    others = [name for name in ENGINES if name != launcher.executor]
    text = f"belongs to executor={{}}, and this is {launcher.executor}; leave it out, or give {{}}"
    if faults := [
        (f"hydra.launcher.{name}.{key}", text.format(name, "null" if default is None else default))
        for name in others
        for key, default in DEFAULTS[name].items()
        if launcher.engines[name].get(key, default) != default
    ]:
        raise ConfigError(faults)
    return ENGINES[launcher.executor](launcher.engines[launcher.executor])


def _executor(
    launcher: Any, engine: Engine | None, ours: bool, settings: list[dict[str, str]]
) -> Executor:
    """Return what trains a launch's packs: a cluster, or processes, which are started."""
    if engine is not None:
        return Cluster(engine, Path(str(launcher.config.hydra.sweep.dir)), launcher.workers)
    return Workers(launcher.hydra_context, launcher.task_function, ours, settings)


def _check_sweep_dir(launch_plan: Plan, count: int, holds_sweep: bool) -> None:
    """Refuse a launch into the directory of another sweep, before it writes anything there.

    Raises:
        ConfigError: a job's directory holds another run, or no job can run and there is a sweep.
    """
    refused = [(job, job.error) for job, _ in launch_plan.without_training if job.error is not None]
    occupied = [(job, error) for job, error in refused if isinstance(error, OccupiedError)]
    if occupied or (len(refused) == count and holds_sweep):
        raise ConfigError((f"job {job.number}", str(error)) for job, error in occupied or refused)
