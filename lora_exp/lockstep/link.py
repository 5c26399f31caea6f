"""A worker's pipe to the launcher, and what comes through it while jobs train.

The launcher passes the reports of each worker's jobs on to the workers whose jobs are compared with
them. So jobs in several processes meet at a rung while all of them stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.lockstep.work import Work
from lora_exp.training.interruption import stop

PATIENCE_S = 0.5  # between looks at whether a signal has asked to stop


class Link:
    """The worker's side: sends events, and takes what other workers' jobs have reported."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.received = 0  # messages, so that the launcher knows which ones a waiting worker knows
        self._brackets: list[Bracket] = []

    def work(self) -> Work | None:
        """Wait for work; None: the launcher has no more."""
        try:
            while True:
                message = self._message()
                if isinstance(message, Work):
                    return message
        except EOFError:
            return None

    def send(self, *event: Any) -> None:
        """Send an event to the launcher.

        Raises:
            KeyboardInterrupt: the launcher has ended.
        """
        try:
            self.pipe.send(event)
        except OSError as error:
            if not stop.asked:  # else let every job reach the end of its step
                raise KeyboardInterrupt from error

    def join(self, brackets: Iterable[Bracket]) -> None:
        """Tell the launcher what jobs report to these brackets, and tell them of other jobs."""
        self._brackets = list({id(bracket): bracket for bracket in brackets}.values())
        for bracket in self._brackets:
            bracket.listener = lambda job, rung, value: self.send("reported", job, rung, value)

    def hear(self) -> None:
        """Take what has come, without waiting.

        If the launcher has ended, nothing comes; a signal then stops the jobs at their next step.
        """
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                self._take(self._message())

    def news(self) -> bool:
        """Wait for a report or an end of another worker's job; False: none can come.

        So it is once all workers wait, a signal has asked to stop, or the launcher has ended.
        """
        self.send("waits", self.received)
        with suppress(EOFError, OSError):
            while not stop.asked:
                if self.pipe.poll(PATIENCE_S):
                    comes = self._take(self._message())
                    self.hear()
                    return comes
        return False

    def _message(self) -> Any:
        message = self.pipe.recv()
        self.received += 1
        return message

    def _take(self, message: tuple[Any, ...]) -> bool:
        """Apply a message; return whether it is news."""
        kind, *values = message
        if kind == "nobody":
            return False
        for bracket in self._brackets:
            if values[0] in bracket.jobs:
                (bracket.note if kind == "reported" else bracket.end)(*values)
        return True
