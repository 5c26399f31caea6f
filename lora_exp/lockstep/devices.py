"""Where a launch's workers compute: a GPU for each, or a share of the CPU's threads."""

from __future__ import annotations

import os
from pathlib import Path

from lora_exp.errors import ConfigError

CUDA, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
GPUS = Path("/proc/driver/nvidia/gpus")


def visible() -> list[str]:
    """Return the names of the GPUs that this process may use, without loading torch."""
    if not GPUS.is_dir():
        return []
    names = os.environ.get(CUDA)
    if names is None:
        return [str(n) for n in range(len(list(GPUS.iterdir())))]
    return [name for name in names.replace(" ", "").split(",") if name not in ("", "-1")]


VISIBLE = visible()  # when the process began


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
    # several processes share the terminal: they print lines, no tables that are drawn again
    lines = {"TTY_COMPATIBLE": "0"}
    if not VISIBLE:
        threads = os.environ.get(THREADS) or str(threads_each(count))
        return [{THREADS: threads, **lines}] * count
    if count > len(VISIBLE):
        text = f"{count} workers need as many GPUs, and {CUDA} has {len(VISIBLE)}"
        raise ConfigError([("hydra.launcher.workers", text)])
    return [{CUDA: name, **lines} for name in VISIBLE[:count]]


def where(jobs: list[int], workers: list[dict[str, str]]) -> list[tuple[list[int], str]]:
    """Return a line for the plan, with the numbers of jobs that several workers train."""
    if len(workers) == 1 or not jobs:
        return []
    text = f"in {len(workers)} workers, each"
    if CUDA in workers[0]:
        return [(jobs, f"{text} with a GPU of its own")]
    threads = workers[0][THREADS]
    count = f"{threads} thread{'s' * (threads != '1')}"
    return [(jobs, f"{text} with {count}: bits as of runs with {THREADS}={threads}")]


def threads_each(workers: int) -> int:
    """Return how many of the CPU's threads each worker has."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def memory_share(workers: int) -> float:
    """Return the share of the free memory that a worker may fill; each GPU has its own."""
    return 1.0 if VISIBLE else 1 / workers
