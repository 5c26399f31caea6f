"""The hub: every job is a greenlet; when all jobs wait, their requests are served together.

Knows nothing of models: the server knows what a request is and how several are served as one.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent, greenlet

from lora_exp.lockstep.state import ProcessState, RandomState

log = logging.getLogger("lora_exp")


@dataclass
class Request:
    """What a job waits for; requests with equal `batch_key` may be served as one."""

    job: int
    batch_key: Hashable
    size: int  # its part of the hub's capacity
    priority: int  # lower ones are served first: a backward waits until no forward is left
    payload: Any
    random: RandomState  # the job's; the server advances it when it draws for the job
    sequence: int = 0  # of requests: lower ones are older


class Server(Protocol):
    """Answers requests with the same `batch_key`, all at once."""

    def serve(self, requests: list[Request]) -> list[Any]:
        """Return the answer to each request.

        Raises:
            Exception: anything went wrong; all or some of the requests can then be served again.
        """


class Hub:
    """Runs jobs in turn until all of them wait, then serves them together.

    Greenlets, not threads: jobs switch only in `ask`, so every other line of a job runs as it would
    alone, and torch has one pool of threads instead of one for each job.
    """

    def __init__(self, server: Server, width: int, capacity: int) -> None:
        self.server, self.width, self.capacity = server, width, capacity
        self.tick: Callable[[], None] = lambda: None  # called between passes
        # waits for what other processes report; False: nothing can come any more
        self.news: Callable[[], bool] = lambda: False
        # limit of requests served as one, set when memory runs out
        self.max_batch: int | None = None
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._live: dict[int, greenlet] = {}
        self._waiting: dict[int, Request] = {}
        self._conditions: dict[int, Callable[[], bool]] = {}  # of jobs that wait for others
        self._request_count = 0
        self._seconds: defaultdict[int, float] = defaultdict(float)  # up to the last switch
        self._switched = 0.0  # when the running job was switched to

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run all jobs, at most `width` at once; when one ends, the next begins.

        A job must handle its own errors; errors of its requests are raised in it by `ask`.
        """
        self._main, self._own_state = getcurrent(), (ProcessState.now(), RandomState.now())
        self._queue = deque(enumerate(jobs))
        try:
            while self._queue or self._live:
                while self._queue and len(self._live) < self.width:
                    number, job = self._queue.popleft()
                    self._restore_own_state()  # every job begins in the same state
                    self._live[number] = greenlet(job, self._main)
                    self._switch(number)
                self._serve()
                self.tick()
        except BaseException as error:
            self._end(error)
            raise

    @property
    def queued(self) -> int:
        """Return how many jobs have not begun."""
        return len(self._queue)

    def seconds(self, job: int) -> float:
        """Return the running job's share of the time: its own code, and its part of what is served.

        A part is by size, so the shares of all jobs add up to the time of the hub.
        """
        return self._seconds[job] + time.perf_counter() - self._switched

    def ask(self, job: int, batch_key: Hashable, size: int, priority: int, payload: Any) -> Any:
        """Wait, in the running job, until its request is served, and return the answer."""
        self._request_count += 1
        request = Request(
            job, batch_key, size, priority, payload, RandomState.now(), self._request_count
        )
        state = ProcessState.now()
        self._waiting[job] = request
        try:
            return self._main.switch()
        finally:
            state.restore()
            request.random.restore()

    def wait_for(self, job: int, condition: Callable[[], bool]) -> None:
        """Wait, in the running job, until a condition holds or nothing can bring it about."""
        random, state = RandomState.now(), ProcessState.now()
        self._conditions[job] = condition
        try:
            self._main.switch()
        finally:
            state.restore()
            random.restore()

    def _serve(self) -> None:
        """Serve waiting requests: forwards before backwards; the reverse if memory has run out."""
        ready = [job for job, holds in sorted(self._conditions.items()) if holds()]
        if not ready and not self._waiting:
            if not self._queue and self.news():
                return
            ready = sorted(self._conditions)
        for job in ready:
            del self._conditions[job]
            self._switch(job)
        if not self._waiting:
            return
        low_memory = self.max_batch is not None
        first = min(
            self._waiting.values(),
            key=lambda r: (-r.priority, r.sequence) if low_memory else (r.priority, r.sequence),
        )
        due = [r for _, r in sorted(self._waiting.items()) if r.priority == first.priority]
        keys = dict.fromkeys([first.batch_key, *(r.batch_key for r in due)])
        if low_memory:  # keep the graph of only one batch at a time
            keys = {first.batch_key: None}
            due.sort(key=lambda r: r.sequence)
        for batch_key in keys:  # all in one round, so that jobs that are out of step can catch up
            for batch in self._batches([r for r in due if r.batch_key == batch_key]):
                self._serve_batch(batch)
                if self.max_batch is not None:
                    return

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Cut requests into batches that are served as one."""
        batch: list[Request] = []
        for request in requests:
            full = sum(r.size for r in batch) + request.size > self.capacity
            if batch and (full or len(batch) == self.max_batch):
                yield batch
                batch = []
            batch.append(request)
        yield batch

    def _serve_batch(self, requests: list[Request]) -> None:
        """Serve requests; on an error serve them in halves, so that only the job at fault gets it.

        When memory runs out, they keep waiting for smaller batches and for memory of the others.
        """
        half = len(requests) // 2
        try:
            with self._shared_time(requests):
                answers = self.server.serve(requests)
        except Exception as error:
            if out_of_memory(error) and (half or self._others_hold_memory(requests[0])):
                self.max_batch = max(1, min(self.max_batch or half, half))
                self._restore_own_state()
                log.warning("out of memory: from here on %d jobs share a pass", self.max_batch)
                return
            if not half:
                self._resume(requests[0].job, error=error)
                return
            answers = None
        if answers is None:  # outside `except`: the error no longer keeps tensors alive
            self._serve_batch(requests[:half])
            self._serve_batch(requests[half:])
            return
        for request, answer in zip(requests, answers, strict=True):
            self._resume(request.job, answer)

    @contextmanager
    def _shared_time(self, requests: list[Request]) -> Iterator[None]:
        began, size = time.perf_counter(), sum(request.size for request in requests)
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            for request in requests:
                share = request.size / size if size else 1 / len(requests)
                self._seconds[request.job] += seconds * share

    def _others_hold_memory(self, request: Request) -> bool:
        """Return whether other requests would free memory if they were served first."""
        return any(r.priority > request.priority for r in self._waiting.values())

    def _resume(self, job: int, *answer: Any, error: BaseException | None = None) -> None:
        del self._waiting[job]
        self._switch(job, *answer, error=error)

    def _switch(self, job: int, *answer: Any, error: BaseException | None = None) -> None:
        self._switched = time.perf_counter()
        try:
            if error is not None:
                self._live[job].throw(error)
            else:
                self._live[job].switch(*answer)
        finally:
            self._seconds[job] += time.perf_counter() - self._switched
            if self._live[job].dead:
                del self._live[job]
                self._restore_own_state()

    def _restore_own_state(self) -> None:
        """Restore the hub's own process state in place of the last job's."""
        for state in self._own_state:
            state.restore()

    def _end(self, error: BaseException) -> None:
        """Raise the error in every job, so that each can finish its record."""
        self._waiting.clear()
        self._conditions.clear()
        for job in list(self._live):
            try:
                self._switch(job, error=type(error)(*error.args))
            except BaseException as second_error:
                if not isinstance(second_error, type(error)):
                    log.warning("job %d: %s while it ended", job, second_error)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or a CPU."""
    import torch

    messages = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    )
