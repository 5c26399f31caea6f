"""Work for a worker: jobs, and whether they share a base. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count
from operator import itemgetter

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.files.paths import asset
from lora_exp.lockstep.devices import memory_share
from lora_exp.lockstep.plan import Job, labels

WEIGHTS = (".safetensors", ".bin", ".gguf")
EPOCH_ROWS = 1000  # only the ratio between jobs matters


@dataclass(frozen=True)
class Work:
    """Jobs that share a base, and in which mode; None: each has the process to itself."""

    jobs: tuple[Job, ...]
    mode: str | None
    max_jobs: int | None
    names: tuple[str, ...] = ()
    verify: float = 0.0
    brackets: Mapping[int, Bracket] = field(default_factory=dict)  # of jobs that are compared
    memory_share: float = 1.0  # of the free memory; the rest is for other workers

    @property
    def labelled(self) -> list[tuple[int, str]]:
        """The jobs' numbers and names; without names the numbers stand for them."""
        numbers = [job.number for job in self.jobs]
        return [*zip(numbers, self.names or map(str, numbers), strict=True)]


def dealt(
    packs: Iterable[Sequence[Job]],
    alone: Sequence[Job],
    brackets: Mapping[int, Bracket],
    workers: int | None = 1,
) -> list[Work]:
    """Return work for some workers: packs are halved until each worker has about as much.

    Args:
        packs: jobs that share a base.
        alone: jobs that each need one to themselves.
        brackets: those of these and other jobs.
        workers: their number; of several, each fills its share of the memory. None: one for each
            pack, and for each job alone.
    """
    parts = [list(pack) for pack in packs if pack]
    if workers == 1:
        work = [together(part, brackets, labels(part)) for part in parts]
        return [*work, apart(alone, brackets)] if alone else work
    if workers is None:
        names = labels([job for part in parts for job in part])
        whole = [together(part, brackets, names) for part in parts]
        return [*whole, *(apart([job], brackets) for job in alone)]
    costs = costs_of([job for part in [*parts, alone] for job in part])
    fair = sum(costs.values()) / workers + max(costs.values(), default=0)
    parts = _halved(parts, costs, fair)
    names = labels([job for part in [*parts, alone] for job in part])
    work = [*(together(part, brackets, names) for part in parts)]
    work += [replace(apart([job], brackets), names=(names[job.number],)) for job in alone]
    work.sort(key=lambda part: -sum(costs[job.number] for job in part.jobs))  # the longest first
    return [replace(part, memory_share=memory_share(workers)) for part in work]


def _halved(parts: Iterable[list[Job]], costs: Mapping[int, float], fair: float) -> list[list[Job]]:
    """Return packs of which none costs more than is fair, unless it has less than four jobs."""
    ids = count()
    heap = [(-sum(costs[job.number] for job in part), next(ids), part) for part in parts]
    heapify(heap)
    while heap and -heap[0][0] > fair and len(heap[0][2]) >= 4:
        for half in _halves(heappop(heap)[2]):
            heappush(heap, (-sum(costs[job.number] for job in half), next(ids), half))
    return [part for _, _, part in sorted(heap, key=itemgetter(1))]


def _halves(jobs: list[Job]) -> list[list[Job]]:
    """Return two parts at random, so that those which are not stopped early are in both."""
    drawn = random.Random(0).sample(jobs, len(jobs))
    middle = len(jobs) // 2
    return [sorted(part, key=lambda job: job.number) for part in (drawn[:middle], drawn[middle:])]


def costs_of(jobs: Sequence[Job]) -> dict[int, float]:
    """Return what jobs cost, by number, in rows times the bytes of their bases.

    Only the ratio matters: if a base is not on this machine, all count as equally large.
    """
    paths = {job.number: str(job.values.model.path) for job in jobs}
    sizes = {path: _bytes(path) for path in set(paths.values())}
    if not all(sizes.values()):
        sizes = dict.fromkeys(sizes, 1)
    return {job.number: rows(job) * sizes[paths[job.number]] for job in jobs}


def _bytes(path: str) -> int:
    """Return the size of a local base's weights; 0: there are none."""
    files = (file for file in asset(path).glob("*") if file.suffix in WEIGHTS)
    return sum(file.stat().st_size for file in files)


def rows(job: Job) -> float:
    """Return how many rows a job trains on; of epochs, as if the data had a thousand rows."""
    train = job.values.train
    if train.max_steps <= 0:
        return float(train.num_train_epochs * EPOCH_ROWS)
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return float(batch * train.max_steps)


def together(
    jobs: Sequence[Job], brackets: Mapping[int, Bracket], names: Mapping[int, str]
) -> Work:
    """Return jobs as a pack; it may hold jobs of several brackets, and a bracket of several packs.

    Args:
        jobs: one or more.
        brackets: those of these and other jobs.
        names: of jobs, by number, for the table.
    """
    # a job that is refused on this machine, not on the launcher's, has no values
    lockstep = (next((job.values for job in jobs if job.values), None) or jobs[0].config).lockstep
    return Work(
        tuple(jobs),
        lockstep.mode,
        lockstep.get("max_jobs"),
        tuple(names[job.number] for job in jobs),
        lockstep.verify,
        _of(jobs, brackets),
    )


def apart(jobs: Sequence[Job], brackets: Mapping[int, Bracket]) -> Work:
    """Return jobs that run one after the other, each with a base of its own."""
    return Work(tuple(jobs), None, None, brackets=_of(jobs, brackets))


def _of(jobs: Sequence[Job], brackets: Mapping[int, Bracket]) -> dict[int, Bracket]:
    return {job.number: brackets[job.number] for job in jobs if job.number in brackets}
