"""Where a run trains: alone in its process, or in a lockstep pack that shares one base.

The run does not know which: it asks its place for everything that a pack shares.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from omegaconf import DictConfig

if TYPE_CHECKING:
    from lora_exp.early_stopping.bracket import Bracket
    from lora_exp.model.loading import Base
    from lora_exp.record.progress import Board
    from lora_exp.training.untrained import Content, Measure, Measured

T = TypeVar("T")


class Place(Protocol):
    """The interface of a place."""

    name: str  # for the run's record
    job: int  # its number in a sweep
    bracket: Bracket | None  # the jobs that it is compared with
    settled: DictConfig | None  # its config, if the launcher has settled and validated it

    def base(self, cfg: DictConfig) -> Base:
        """Return the base for the run's adapter."""

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Return what runs with an equal key share, made by the first of them."""

    def board(self) -> Board:
        """Return the board that shows the run's progress."""

    def untrained(
        self, cfg: DictConfig, trainer: Any, measure: Measure, content: Content
    ) -> Measured:
        """Return the results of `measure` before training, which may be shared or known.

        Args:
            cfg: the run's.
            trainer: it logs results that it has not measured itself.
            measure: measures.
            content: gives a hash of all that decides the results, or None.
        """

    def join(self, trainer: Any) -> None:
        """Prepare a trainer that is about to measure and train."""

    def seconds(self) -> float:
        """Return a clock of the run's time: in a pack its share, alone all that passes."""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or nothing can bring it about while the run waits."""

    def report(self) -> dict[str, Any]:
        """Return what the place adds to the run's record after training."""

    def leave(self) -> None:
        """Free what belongs to the run, which has ended or failed."""


class Alone:
    """A process of its own: nothing is shared."""

    name = "alone"

    def __init__(
        self,
        job: int = 0,
        bracket: Bracket | None = None,
        news: Callable[[], bool] = lambda: False,
        recalls: bool = True,
        settled: DictConfig | None = None,
        board: Board | None = None,
    ) -> None:
        """Create the place of a run, or of a job that is compared with others of its sweep.

        Args:
            job: its number in the sweep.
            bracket: the jobs that it is compared with.
            news: waits for what jobs of other processes report; False: nothing can come any more.
            recalls: whether results before training may be those that the cache has.
            settled: its config, if the launcher has settled and validated it.
            board: where its progress is shown; None: a progress bar.
        """
        self._board = board
        self.job, self.bracket, self.settled = job, bracket, settled
        self._news, self._recalls = news, recalls

    def base(self, cfg: DictConfig) -> Base:
        """Load the base, and say so: a large one takes minutes."""
        from rich.text import Text

        from lora_exp.model.loading import base_of
        from lora_exp.model.memory import reset_peak
        from lora_exp.record.console import print_and_log

        reset_peak()
        print_and_log(Text(f"loading {cfg.model.path}", style="dim"))
        return base_of(cfg)

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Make it: nobody else is here."""
        return make()

    def board(self) -> Board:
        """Return the board that it was given, or a progress bar."""
        from lora_exp.record.progress import Bar

        return self._board or Bar()

    def untrained(
        self, cfg: DictConfig, trainer: Any, measure: Measure, content: Content
    ) -> Measured:
        """Measure, unless the cache has the results of the same content."""
        from lora_exp.training.untrained import recalled

        return recalled(trainer, measure, content) if self._recalls else measure()

    def join(self, trainer: Any) -> None:
        """Leave the trainer as it is."""

    def seconds(self) -> float:
        """Return the seconds that have passed."""
        return time.perf_counter()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for jobs of other processes: no other job is here."""
        while not condition() and self._news():
            pass

    def report(self) -> dict[str, Any]:
        """Return nothing: alone there is nothing to add."""
        return {}

    def leave(self) -> None:
        """Free memory: trainers are in reference cycles, which keep the base alive."""
        from lora_exp.model.memory import give_back

        gc.collect()
        give_back()


here: ContextVar[Place] = ContextVar("here", default=Alone())  # noqa: B039 (it has no state)
