"""Seconds and tokens of training since it began or resumed, evaluations excluded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Clock:
    """A clock of training that stops during evaluations."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Create a clock that starts from zero.

        Args:
            now: seconds; in a pack only those that are the job's share.
        """
        self.now = now
        self.count: Callable[[], int] = lambda: 0  # the trainer's tokens so far
        self.begin()

    def begin(self) -> None:
        """Start from zero; a resumed trainer counts the earlier tokens, too."""
        self._began, self._evaluating, self._counted = self.now(), 0.0, self.count()

    @property
    def seconds(self) -> float:
        """Return the seconds of training."""
        return self.now() - self._began - self._evaluating

    @property
    def tokens(self) -> int:
        """Return the tokens trained on."""
        return self.all_tokens - self._counted

    @property
    def all_tokens(self) -> int:
        """Return the tokens trained on, those before a resume too."""
        return self.count()

    def without(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function for an evaluation whose time is excluded."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = self.now()
            try:
                return evaluate(*arguments, **options)
            finally:
                self._evaluating += self.now() - start

        return timed
