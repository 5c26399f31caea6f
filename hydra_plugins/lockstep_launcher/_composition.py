"""The jobs of a launch, composed as every launcher does."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write

from lora_exp.config.overrides import split_override
from lora_exp.config.sweeping import too_long
from lora_exp.config.validation import job_config
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.lockstep.plan import Job

log = logging.getLogger(__name__)
COLLECTED = 100  # jobs


def common_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys that all jobs of a sweep override alike."""
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return sorted(split_override(override)[0] for override in shared)


def in_processes(launcher: Any, jobs: Sequence[Sequence[str]]) -> bool:
    """Return whether a job may train in processes of its own."""
    keys = {split_override(override)[0].partition(".")[0] for job in jobs for override in job}
    if launcher.config.parallel.processes != 1 or "parallel" in keys:
        return True
    presets = {word: job for job in jobs for word in job if word.startswith("experiment=")}
    loader = launcher.hydra_context.config_loader
    for job in presets.values():
        with suppress(HydraException):  # a job that cannot be composed says so itself
            if loader.load_sweep_config(launcher.config, list(job)).parallel.processes != 1:
                return True
    return False


def composed_jobs(
    launcher: Any, job_overrides: Sequence[Sequence[str]], first: int, ours: bool
) -> list[Job]:
    """Compose all jobs of a launch; see `composed_job`.

    Python's collector goes through all that is alive, again and again while thousands of configs
    come to it: here it goes once through those of `COLLECTED` jobs.
    """
    common, jobs, collecting = common_keys(job_overrides), list[Job](), gc.isenabled()
    gc.disable()
    try:
        for number, overrides in enumerate(job_overrides, first):
            jobs.append(composed_job(launcher, list(overrides), number, ours, common))
            if len(jobs) % COLLECTED == 0:
                gc.collect()
                gc.freeze()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return jobs


def composed_job(
    launcher: Any, overrides: list[str], number: int, ours: bool, common: list[str]
) -> Job:
    """Compose a job as every launcher does, and settle its config as the job itself will."""
    log.info("#%d : %s", number, " ".join(filter_overrides(overrides)))
    config: DictConfig = launcher.hydra_context.config_loader.job(launcher.config, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
        if ours:  # Hydra's list of keys that do not distinguish jobs
            excluded = config.hydra.job.config.override_dirname.exclude_keys
            excluded += [key for key in common if key not in excluded]
    directory = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
    if faults := list(too_long(directory)):
        raise ConfigError(faults)
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(directory.absolute())
    try:
        master = launcher.config.hydra
        settled = job_config(config, config.hydra, master) if ours else None
    except LoraExpError as error:  # the job itself raises it again, in its own directory
        return Job(number, config, None, directory, tuple(overrides), error)
    return Job(number, config, settled, directory, tuple(overrides))
