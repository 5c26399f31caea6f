"""Work for a worker: jobs, and whether they share a base. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.lockstep.devices import memory_share
from lora_exp.lockstep.plan import Job, labels

EPOCH_ROWS = 1000  # only the ratio between jobs matters


@dataclass(frozen=True)
class Work:
    """Jobs that share a base, and in which mode; None: each has the process to itself."""

    jobs: tuple[tuple[int, DictConfig], ...]
    mode: str | None
    max_jobs: int | None
    names: tuple[str, ...] = ()
    verify: float = 0.0
    brackets: Mapping[int, Bracket] = field(default_factory=dict)  # of jobs that are compared
    memory_share: float = 1.0  # of the free memory; the rest is for other workers


def dealt(
    packs: Iterable[Sequence[Job]],
    alone: Sequence[Job],
    brackets: Mapping[int, Bracket],
    workers: int = 1,
) -> list[Work]:
    """Return work for some workers: packs are halved until each worker has about as many rows.

    Args:
        packs: jobs that share a base.
        alone: jobs that each need one to themselves.
        brackets: those of these and other jobs.
        workers: their number; of several, each fills its share of the memory.
    """
    parts = [list(pack) for pack in packs if pack]
    if workers == 1:
        work = [together(part, brackets, labels(part)) for part in parts]
        return [*work, apart(alone, brackets)] if alone else work
    most = max((rows([job]) for part in [*parts, alone] for job in part), default=0)
    fair = rows([job for part in [*parts, alone] for job in part]) / workers + most
    while parts and rows(largest := max(parts, key=rows)) > fair and len(largest) >= 4:
        parts.remove(largest)
        parts += _halves(largest)
    names = labels([job for part in [*parts, alone] for job in part])
    work = [*(together(part, brackets, names) for part in parts)]
    work += [apart([job], brackets) for job in alone]
    costs = [*map(rows, parts), *(rows([job]) for job in alone)]
    order = sorted(range(len(work)), key=lambda i: -costs[i])  # the longest first
    return [replace(work[i], memory_share=memory_share(workers)) for i in order]


def _halves(jobs: list[Job]) -> list[list[Job]]:
    """Return two parts at random, so that those which are not stopped early are in both."""
    drawn = random.Random(0).sample(jobs, len(jobs))
    middle = len(jobs) // 2
    return [sorted(part, key=lambda job: job.number) for part in (drawn[:middle], drawn[middle:])]


def rows(jobs: Iterable[Job]) -> float:
    """Return how many rows jobs train on; of epochs, as if the data had a thousand rows."""
    total = 0.0
    for job in jobs:
        train: Any = job.settled.train  # type: ignore[union-attr]
        batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
        epochs = train.num_train_epochs * EPOCH_ROWS
        total += batch * train.max_steps if train.max_steps > 0 else epochs
    return total


def together(
    jobs: Sequence[Job], brackets: Mapping[int, Bracket], names: Mapping[int, str]
) -> Work:
    """Return jobs as a pack; it may hold jobs of several brackets, and a bracket of several packs.

    Args:
        jobs: one or more.
        brackets: those of these and other jobs.
        names: of jobs, by number, for the table.
    """
    lockstep: Any = jobs[0].config.lockstep
    return Work(
        _configs(jobs),
        lockstep.mode,
        lockstep.get("max_jobs"),
        tuple(names[job.number] for job in jobs),
        lockstep.verify,
        _of(jobs, brackets),
    )


def apart(jobs: Sequence[Job], brackets: Mapping[int, Bracket]) -> Work:
    """Return jobs that run one after the other, each with a base of its own."""
    return Work(_configs(jobs), None, None, brackets=_of(jobs, brackets))


def _configs(jobs: Sequence[Job]) -> tuple[tuple[int, DictConfig], ...]:
    return tuple((job.number, job.config) for job in jobs)


def _of(jobs: Sequence[Job], brackets: Mapping[int, Bracket]) -> dict[int, Bracket]:
    return {job.number: brackets[job.number] for job in jobs if job.number in brackets}
