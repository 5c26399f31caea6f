"""The processes of one run: their number, and how they divide the rows of a step.

Needs no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.door import Section
from lora_exp.config.ranges import Fault, is_number

CUDA, GPUS = "CUDA_VISIBLE_DEVICES", Path("/proc/driver/nvidia/gpus")
THREADS = "OMP_NUM_THREADS"
COMPARING = ("lora_exp.early_stopping.rules.Halving", "lora_exp.early_stopping.rules.Median")
# what processes share out, besides the rows of a step
SHARED = {"zero2": "optimizer's state", "fsdp": "frozen layers"}
SHARED_IN_FULL = SHARED | {"fsdp": "weights and the optimizer's state"}  # where all of them train
# arguments of trainers under which the rows of a step would no longer be those of one process
APART = {
    "auto_find_batch_size": "begins again with another batch",
    "accelerator_config": "may deal rows out in another way",
}


def visible() -> list[str]:
    """Return the names of the GPUs that this process may use, without loading torch."""
    if not GPUS.is_dir():
        return []
    names = os.environ.get(CUDA)
    if names is None:
        return [str(n) for n in range(len(list(GPUS.iterdir())))]
    return [name for name in names.replace(" ", "").split(",") if name not in ("", "-1")]


def thread_count() -> int:
    """Return how many of the CPU's threads this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


VISIBLE = visible()  # when the process began


def process_count(cfg: Any) -> int:
    """Return in how many processes a settled config trains."""
    parallel = cfg.get("parallel")  # which configs of earlier versions do not have
    return int(parallel["processes"]) if parallel else 1


def node_count(cfg: Any) -> int:
    """Return among how many nodes of a Slurm job the processes are shared out."""
    return int((cfg.get("parallel") or {}).get("nodes", 1))


def with_processes(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values with a number of processes; null is one for each visible GPU.

    On several nodes it is as many on each.
    """
    parallel = values.get("parallel")
    if not isinstance(parallel, Mapping) or parallel.get("processes", 0) is not None:
        return values
    nodes = parallel.get("nodes", 1)
    count = max(len(VISIBLE), 1) * (nodes if type(nodes) is int and nodes > 0 else 1)
    return values | {"parallel": dict(parallel) | {"processes": count}}


def divided(cfg: DictConfig | Section) -> dict[str, int] | None:
    """Return each process's rows of a pass, and its passes of a step, by their names in `train`.

    Passes are divided first: so each pass stays as large as the config has it. All processes
    together take the rows of the config's step.

    Returns:
        None: the rows cannot be divided evenly.
    """
    count, train = process_count(cfg), cfg.train
    rows, passes = train.per_device_train_batch_size, train.gradient_accumulation_steps
    # of rollouts, where the config says how many passes one takes
    fixed = cfg.algorithm.args.get("steps_per_generation")
    shared = 1 if fixed else math.gcd(passes, count)
    if rows % (count // shared):
        return None
    return {
        "per_device_train_batch_size": rows // (count // shared),
        "gradient_accumulation_steps": passes // shared,
    }


def shares_text(cfg: DictConfig) -> str:
    """Return in how many processes a run trains and how they divide a step; empty: not asked."""
    if cfg.choices.get("parallel", "none") == "none":
        return ""
    count, shares = process_count(cfg), divided(cfg) or {}
    if count == 1:
        hint = "" if VISIBLE else ", for there is no GPU to see; parallel.processes=2 starts two"
        return f"one{hint}"
    rows, passes = shares.values()
    whole = cfg.train.per_device_train_batch_size * cfg.train.gradient_accumulation_steps
    times = f" in {passes} passes" if passes > 1 else ""
    kinds = SHARED_IN_FULL if cfg.peft is None else SHARED
    shared = kinds.get(str(cfg.parallel.get("sharding")))
    share = f", and has a share of the {shared}" if shared else ""
    nodes = f" on {node_count(cfg)} nodes" if node_count(cfg) > 1 else ""
    text = f"{count}{nodes}, each takes {rows * passes} of the {whole} rows of a step{times}{share}"
    return text if VISIBLE else f"{text}; {_threads_text(cfg)}"


def threads_each(processes: int) -> str:
    """Return OMP_NUM_THREADS for each of several processes on this CPU: what is set, or a share."""
    return os.environ.get(THREADS) or str(max(1, thread_count() // processes))


def _threads_text(cfg: DictConfig) -> str:
    count, nodes = process_count(cfg), node_count(cfg)
    each, there = threads_each(count // nodes), thread_count()
    text = f"{each} thread{'s' * (each != '1')} each"
    # on nodes a process may have some of the CPUs to itself
    if nodes > 1 or not each.isdecimal() or count * int(each) <= there:
        return text
    return f"{text}, {count * int(each)} in all, on {there} CPU{'s' * (there != 1)}"


def process_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each setting with which a run cannot train in several processes."""
    key, parallel = "parallel.processes", cfg.get("parallel")
    if parallel is None:
        return
    count = parallel.get("processes")
    if type(count) is not int or count < 1:
        yield key, f"{count!r} is not 1 or more; null takes one for each visible GPU"
        return
    nodes = parallel.get("nodes", 1)
    if type(nodes) is not int or nodes < 1 or count % nodes:
        text = f"{nodes!r} does not divide {count} processes evenly; give as many on each node"
        yield "parallel.nodes", text
        return
    if VISIBLE and count // nodes > len(VISIBLE):
        text = f"{count // nodes} processes need as many GPUs, and {len(VISIBLE)} can be seen"
        yield key, f"{text} ({CUDA})"
    if count == 1:
        return
    if cfg.choices.get("parallel", "none") == "none":
        yield key, f"{count} processes need an option that says what they share; give parallel=ddp"
    yield from _undivided(cfg, count)
    if cfg.early_stopping is not None and cfg.early_stopping.get("_target_") in COMPARING:
        text = f"{cfg.choices.early_stopping} compares jobs, which one in several processes cannot"
        yield "early_stopping", f"{text} be; patience and threshold work"
    for name, why in APART.items():
        if cfg.train.get(name) or cfg.algorithm.args.get(name):
            yield f"train.{name}", f"{why} in {count} processes; leave it out"


def _undivided(cfg: Section, count: int) -> Iterator[Fault]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows, passes = (cfg.train[name] for name in names)
    for name, number in zip(names, (rows, passes), strict=True):
        if type(number) is not int and is_number(number):
            yield f"train.{name}", f"{number} is not a whole number, which processes could share"
    if not all(type(n) is int and n > 0 for n in (rows, passes)):
        return  # another check names it
    if divided(cfg) is None:
        fixed = cfg.algorithm.args.get("steps_per_generation")
        what = f"{rows} rows" if fixed else f"{rows} rows x {passes} passes of a step"
        text = f"{count} processes cannot share {what} evenly; give a divisor of"
        text = f"{text} {rows if fixed else rows * passes}, or another"
        yield "parallel.processes", f"{text} train.per_device_train_batch_size"
