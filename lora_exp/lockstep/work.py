"""Work for a worker: jobs, and whether they share a base. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.lockstep.plan import Job, labels


@dataclass(frozen=True)
class Work:
    """Jobs that share a base, and in which mode; None: each has the process to itself."""

    jobs: tuple[tuple[int, DictConfig], ...]
    mode: str | None
    max_jobs: int | None
    names: tuple[str, ...] = ()
    verify: float = 0.0
    brackets: Mapping[int, Bracket] = field(default_factory=dict)  # of jobs that are compared


def together(jobs: Sequence[Job], brackets: Mapping[int, Bracket]) -> Work:
    """Return jobs as a pack; it may hold jobs of several brackets, and a bracket of several packs.

    Args:
        jobs: one or more.
        brackets: those of these and other jobs.
    """
    lockstep: Any = jobs[0].config.lockstep
    return Work(
        _configs(jobs),
        lockstep.mode,
        lockstep.get("max_jobs"),
        tuple(labels(jobs).values()),
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
