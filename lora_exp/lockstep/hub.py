"""The hub: every job a greenlet, served together once all of them wait.

Knows nothing of models: what a request is, and how several are served as one, is the server's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent, greenlet

from lora_exp.lockstep.state import ProcessState, RandomState

log = logging.getLogger("lora_exp")


@dataclass
class Request:
    """What a job waits for; requests with equal `kind` may be served as one."""

    job: int
    kind: Hashable
    size: int  # how much of the hub's room it takes
    order: int  # the lower is served first: a backward waits until no forward does
    payload: Any
    random: RandomState  # the job's; what draws for the job while it waits moves it on
    age: int = 0  # the lower asked earlier


class Server(Protocol):
    """Answers requests of one kind, in one go."""

    def serve(self, requests: list[Request]) -> list[Any]:
        """Return an answer to each.

        Raises:
            Exception: whatever went wrong; the same requests can be made again, or some of them.
        """


class Hub:
    """Runs jobs in turn until each waits, then serves them together.

    Greenlets, not threads: jobs switch only where they ask, so a job's every other line runs as it
    would alone, and torch keeps one team of threads instead of one for each job.
    """

    def __init__(self, server: Server, width: int, room: int) -> None:
        self.server, self.width, self.room = server, width, room
        self.tick: Callable[[], None] = lambda: None  # called between passes
        self.fused: int | None = None  # the most requests served as one; shrinks without memory
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._live: dict[int, greenlet] = {}
        self._waiting: dict[int, Request] = {}
        self._asked = 0

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run all jobs, at most `width` at once; as one ends the next takes its place.

        A job's function must keep its own errors; it is told of those of its requests.
        """
        self._main, self._own = getcurrent(), (ProcessState.now(), RandomState.now())
        self._queue = deque(enumerate(jobs))
        try:
            while self._queue or self._live:
                while self._queue and len(self._live) < self.width:
                    number, job = self._queue.popleft()
                    self._mine()  # it begins as the first did
                    self._live[number] = greenlet(job, self._main)
                    self._switch(number)
                self._serve()
                self.tick()
        except BaseException as error:
            self._end(error)
            raise

    @property
    def queued(self) -> int:
        """Return how many jobs wait for a place."""
        return len(self._queue)

    def ask(self, job: int, kind: Hashable, size: int, order: int, payload: Any) -> Any:
        """Wait, as the running job, until the request is served."""
        self._asked += 1
        request = Request(job, kind, size, order, payload, RandomState.now(), self._asked)
        state = ProcessState.now()
        self._waiting[job] = request
        try:
            return self._main.switch()
        finally:
            state.restore()
            request.random.restore()

    def _serve(self) -> None:
        """Serve what waits: forwards before backwards, unless memory is short, then the reverse."""
        if not self._waiting:
            return
        short = self.fused is not None
        first = min(
            self._waiting.values(), key=lambda r: (-r.order, r.age) if short else (r.order, r.age)
        )
        due = [r for _, r in sorted(self._waiting.items()) if r.order == first.order]
        kinds = dict.fromkeys([first.kind, *(r.kind for r in due)])
        if short:  # what leads back is held for one share at a time
            kinds = {first.kind: None}
            due.sort(key=lambda r: r.age)
        for kind in kinds:  # all in one round, else jobs that fell out of step would stay so
            for some in self._shares([r for r in due if r.kind == kind]):
                self._answer(some)
                if self.fused is not None:
                    return

    def _shares(self, asked: list[Request]) -> Iterator[list[Request]]:
        """Cut requests into those that are served as one."""
        some: list[Request] = []
        for request in asked:
            full = sum(r.size for r in some) + request.size > self.room
            if some and (full or len(some) == self.fused):
                yield some
                some = []
            some.append(request)
        yield some

    def _answer(self, requests: list[Request]) -> None:
        """Serve some requests; if that fails, by halves, until the error has found its job.

        Without memory they go on waiting, for smaller shares and for what the others hold.
        """
        half = len(requests) // 2
        try:
            answers = self.server.serve(requests)
        except Exception as error:
            if out_of_memory(error) and (half or self._held(requests[0])):
                self.fused = max(1, min(self.fused or half, half))
                self._mine()
                log.warning("out of memory: from here on %d jobs share a pass", self.fused)
                return
            if not half:
                self._go_on(requests[0].job, error=error)
                return
            answers = None
        if answers is None:  # here, where nothing holds the tensors of what failed any more
            self._answer(requests[:half])
            self._answer(requests[half:])
            return
        for request, answer in zip(requests, answers, strict=True):
            self._go_on(request.job, answer)

    def _held(self, request: Request) -> bool:
        """Say whether others hold memory that serving them first would free."""
        return any(r.order > request.order for r in self._waiting.values())

    def _go_on(self, job: int, *answer: Any, error: BaseException | None = None) -> None:
        del self._waiting[job]
        self._switch(job, *answer, error=error)

    def _switch(self, job: int, *answer: Any, error: BaseException | None = None) -> None:
        try:
            if error is not None:
                self._live[job].throw(error)
            else:
                self._live[job].switch(*answer)
        finally:
            if self._live[job].dead:
                del self._live[job]
                self._mine()

    def _mine(self) -> None:
        """Put the hub's own state back, where a job's would show."""
        for state in self._own:
            state.restore()

    def _end(self, error: BaseException) -> None:
        """Tell every job why it ends, so that each leaves its record in order."""
        self._waiting.clear()
        for job in list(self._live):
            try:
                self._switch(job, error=type(error)(*error.args))
            except BaseException as again:
                if not isinstance(again, type(error)):
                    log.warning("job %d: %s while it ended", job, again)


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is torch's word for too little memory, on a GPU or a CPU."""
    import torch

    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )
