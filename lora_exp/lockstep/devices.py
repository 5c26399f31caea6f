"""Where a launch's workers compute: a GPU for each, or a share of the CPU's threads."""

from __future__ import annotations

import os

from lora_exp.config.processes import CUDA, THREADS, VISIBLE, threads_each
from lora_exp.errors import ConfigError


def keep_one() -> None:
    """Let this process see one GPU: a run takes one, and trainers refuse to see several."""
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault(CUDA, "0")


def environments(workers: int | None) -> list[dict[str, str]]:
    """Return the variables of each worker; None: one a GPU, without a GPU one.

    Raises:
        ConfigError: it is not above 0, or more than there are GPUs.
    """
    if workers is not None and workers < 1:
        raise ConfigError([("hydra.launcher.workers", f"{workers} is not above 0")])
    count = workers or max(len(VISIBLE), 1)
    if count == 1:
        return [{}]
    if not VISIBLE:
        return [{THREADS: threads_each(count)}] * count
    if count > len(VISIBLE):
        text = f"{count} workers need as many GPUs, and {CUDA} has {len(VISIBLE)}"
        raise ConfigError([("hydra.launcher.workers", text)])
    return [{CUDA: name} for name in VISIBLE[:count]]


def one_worker(workers: int | None, needed: bool) -> int | None:
    """Return a launch's workers; where jobs train on all devices, these train one after another.

    Raises:
        ConfigError: several are asked for where one is needed.
    """
    if needed and workers is not None and workers > 1:
        text = f"{workers}, but jobs of several processes take all devices, in turn; give 1"
        raise ConfigError([("hydra.launcher.workers", text)])
    return 1 if needed else workers


def where(jobs: list[int], workers: list[dict[str, str]]) -> list[tuple[list[int], str]]:
    """Return a line for the plan, with the numbers of jobs that several workers train."""
    if len(workers) == 1 or not jobs:
        return []
    text = f"in {len(workers)} workers, each"
    if CUDA in workers[0]:
        return [(jobs, f"{text} with a GPU of its own")]
    threads = workers[0][THREADS]
    count = f"{threads} thread{'s' * (threads != '1')}"
    return [(jobs, f"{text} with {count}: bit for bit as runs with {THREADS}={threads}")]


def memory_share(workers: int) -> float:
    """Return the share of the free memory that a worker may fill; each GPU has its own."""
    return 1.0 if VISIBLE else 1 / workers
