"""The jobs of a launch, and what they have in common."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.errors import HydraException

from hydra_plugins.lockstep_launcher._cells import Cells
from lora_exp.config.overrides import split_override
from lora_exp.lockstep.plan import Job

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
            if loader.composed(launcher.config, list(job)).parallel.processes != 1:
                return True
    return False


def composed_jobs(
    launcher: Any, job_overrides: Sequence[Sequence[str]], first: int, ours: bool
) -> list[Job]:
    """Compose and settle all jobs of a launch; see `Cells.job`.

    Python's collector goes through all that is alive, again and again while thousands of configs
    come to it: here it goes once through those of `COLLECTED` jobs.
    """
    cells, jobs = Cells(launcher, ours, common_keys(job_overrides)), list[Job]()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number, overrides in enumerate(job_overrides, first):
            jobs.append(cells.job(overrides, number))
            if len(jobs) % COLLECTED == 0:
                gc.collect()
                gc.freeze()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return jobs
