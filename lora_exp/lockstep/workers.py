"""The launcher's side of its workers: it deals out work, and passes reports on among them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction

from lora_exp.config.processes import THREADS
from lora_exp.errors import Interrupted, LoraExpError
from lora_exp.lockstep.work import Work
from lora_exp.lockstep.worker import serve
from lora_exp.training.interruption import stop

if TYPE_CHECKING:
    from lora_exp.lockstep.table import Table

log = logging.getLogger(__name__)


class Launch(Protocol):
    """Receives the events of jobs, each named by its number."""

    def began(self, number: int) -> None:
        """A job begins."""

    def ended(self, number: int, result: JobReturn) -> None:
        """A job has ended."""

    def unproven(self, numbers: list[int], difference: str) -> None:
        """A pass of these jobs' pack differed from the run alone; they may still train."""


class DiedError(LoraExpError):
    """Workers died; `reasons` has a text for each job that had begun and not ended."""

    def __init__(self, deaths: Sequence[tuple[str, Iterable[int]]]) -> None:
        """Create it from a text of each death, and the jobs that it has interrupted."""
        more = f" (and {len(deaths) - 1} more)" if len(deaths) > 1 else ""
        super().__init__(f"{deaths[0][0]}{more}")
        self.reasons = {job: text for text, jobs in deaths for job in sorted(jobs)}

    @property
    def jobs(self) -> list[int]:
        """The jobs' numbers."""
        return sorted(self.reasons)


class Worker:
    """A process that gets work and sends events."""

    ends: ClassVar[list[Connection]] = []  # the launcher's, of all workers' pipes

    def __init__(self, environment: Mapping[str, str], *arguments: Any) -> None:
        self.environment, self.arguments = dict(environment), arguments
        self.start()

    def start(self) -> None:
        """Start the process: the first, or one in place of one that died."""
        fork = get_context("fork")
        self.pipe, other_end = fork.Pipe()
        Worker.ends.append(self.pipe)
        self.process = fork.Process(
            target=_serve, args=(self.environment, other_end, os.getpid(), *self.arguments)
        )
        self.process.start()
        other_end.close()
        self.work: Work | None = None  # that it does now
        self.running: set[int] = set()  # jobs that have begun and not ended
        self.sent, self.known = 0, -1  # messages to it, and those it knew of when it began to wait
        self.is_dead = False

    @property
    def waits(self) -> bool:
        """Return whether it waits for reports of other workers' jobs, and has all there are."""
        return self.known == self.sent

    def send(self, message: Any) -> None:
        """Send work, or what another worker's job has reported."""
        self.sent += 1
        with suppress(OSError):  # it has died; `received` notices
            self.pipe.send(message)

    def received(self) -> tuple[Any, ...] | None:
        """Return the next event; None: it has died."""
        try:
            return tuple(self.pipe.recv()) if self.pipe.poll() else None
        except (EOFError, OSError):
            return None  # it died while it sent an event

    def close(self) -> None:
        """Close the pipe: the process ends when its work is done."""
        Worker.ends = [end for end in Worker.ends if end is not self.pipe]
        self.pipe.close()

    def stop(self, at_once: bool) -> None:
        """End the process; if it still trains, let it save a checkpoint first, unless `at_once`."""
        self.process.join(timeout=3)
        patient = [] if at_once else [self.ask_to_stop]
        for ask in (*patient, self.process.kill):
            if self.process.is_alive():
                ask()
                self.process.join(timeout=60)

    def ask_to_stop(self) -> None:
        """Let its jobs stop at the end of a step."""
        if self.process.is_alive():
            self.process.terminate()  # SIGTERM


class Workers:
    """The workers of a launch."""

    shares_memory: ClassVar[bool] = True  # one that takes too much may end another

    def __init__(
        self,
        context: HydraContext,
        task: TaskFunction,
        warm: bool,
        environments: Sequence[Mapping[str, str]] = ({},),
    ) -> None:
        """Start them.

        Args:
            context: Hydra's.
            task: what runs a job.
            warm: whether they import torch at once.
            environments: variables of each worker.
        """
        several = len(environments) > 1
        self.workers = [Worker(each, context, task, warm, several) for each in environments]
        self.count: int | None = len(self.workers)
        self._queue: deque[Work] = deque()
        self._table: Table | None = None  # of all jobs, where several workers share the screen
        self._places: dict[int, int] = {}  # of work in it, by the work's first job

    def run(self, work: Iterable[Work], launch: Launch) -> None:
        """Deal work out in its order and pass on events, until all of it is done.

        Raises:
            DiedError: some workers died. The others have ended their work.
        """
        self._queue = deque(work)
        brackets = {id(b): b for part in self._queue for b in part.brackets.values()}
        self._brackets, self._deaths = list(brackets.values()), list[tuple[str, set[int]]]()
        stop.forward = self._ask_to_stop  # the workers stop their jobs at the end of a step
        try:
            with self._shown():
                self._pass_events(launch)
        finally:
            stop.forward = None
        if self._deaths:
            raise DiedError(self._deaths)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the jobs of several workers in one table; one worker shows its own."""
        if len(self.workers) == 1:
            yield
            return
        from lora_exp.lockstep.table import Row, Table

        rows = [Row(*pair) for part in self._queue for pair in part.labelled]
        all_known = all(part.mode is not None for part in self._queue)
        tokens = [0] * len(self._queue) if all_known else None
        self._places = {part.jobs[0].number: place for place, part in enumerate(self._queue)}
        self._table = Table(f"in {len(self.workers)} workers", rows, tokens)
        with self._table.open():
            yield
        self._table = None

    def _pass_events(self, launch: Launch) -> None:
        while busy := self._busy():
            if all(worker.waits for worker in busy):  # for each other: none can report
                for worker in busy:
                    worker.send(("nobody",))
            ready = wait([end for w in busy for end in (w.pipe, w.process.sentinel)])
            for worker in busy:
                if worker.pipe in ready or worker.process.sentinel in ready:
                    self._receive(worker, launch)

    def _busy(self) -> list[Worker]:
        """Give idle workers work, and return those that have some."""
        if stop.asked:
            self._queue.clear()
        for worker in self.workers:
            if self._queue and worker.work is None and not worker.is_dead:
                worker.work = self._queue.popleft()
                worker.send(worker.work)
        return [worker for worker in self.workers if worker.work is not None]

    def _receive(self, worker: Worker, launch: Launch) -> None:
        event = worker.received()
        if event is None:
            self._bury(worker)
            return
        kind, *values = event
        if kind == "over":
            worker.work = None
        elif kind == "waits":
            (worker.known,) = values
        elif kind == "reported":
            self._pass_on(worker, kind, *values)
        elif kind == "shown":
            assert self._table is not None
            assert worker.work is not None
            self._table.take(values[0], self._places[worker.work.jobs[0].number], values[1])
        else:
            if kind == "began":
                worker.running.add(values[0])
            if kind == "ended":
                self._ended(worker, *values)
            getattr(launch, kind)(*values)

    def _ended(self, worker: Worker, number: int, result: JobReturn) -> None:
        worker.running.discard(number)
        value = result._return_value
        if not isinstance(value, Interrupted):
            self._pass_on(worker, "ended", number, isinstance(value, Exception))

    def _pass_on(self, sender: Worker, kind: str, number: int, *values: Any) -> None:
        """Tell what became of a job to those whose jobs are compared with it."""
        for bracket in self._brackets:  # those of the work that is still to be dealt out
            if number in bracket.jobs:
                (bracket.note if kind == "reported" else bracket.end)(number, *values)
        for worker in self.workers:
            theirs = worker.work.brackets.values() if worker.work is not None else ()
            if worker is not sender and any(number in bracket.jobs for bracket in theirs):
                worker.send((kind, number, *values))

    def _bury(self, worker: Worker) -> None:
        worker.process.join()
        text = f"a worker was {exit_reason(worker.process.exitcode or 0)}"
        self._deaths.append((text, worker.running))
        if self._table is not None:
            from lora_exp.lockstep.table import LOST

            if worker.running:
                log.warning("%s; jobs %s wait for the others' end", text, sorted(worker.running))
            for row in self._table.rows:
                if row.number in worker.running:
                    row.end(LOST)
        worker.work, worker.is_dead = None, True

    def replace(self) -> None:
        """Start workers in place of those that died."""
        for worker in self.workers:
            if worker.is_dead:
                worker.close()
                worker.start()

    def stop(self, at_once: bool = False) -> None:
        """End all processes; see `Worker.stop`."""
        for worker in self.workers:
            worker.close()
        for worker in self.workers:
            worker.stop(at_once)

    def _ask_to_stop(self) -> None:
        for worker in self.workers:
            worker.ask_to_stop()


def _serve(
    environment: Mapping[str, str], pipe: Connection, launcher: int, *arguments: Any
) -> None:
    os.environ.update(environment)
    if THREADS in environment and "torch" in sys.modules:  # it has read the variable already
        sys.modules["torch"].set_num_threads(int(environment[THREADS]))
    serve(pipe, Worker.ends, launcher, *arguments)


def exit_reason(code: int) -> str:
    """Return in words how a process ended."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is memory short? lockstep.max_jobs=... takes fewer)" if code == -9 else ""
        return f"killed by {name}{hint}"
    return f"gone with exit code {code}"
