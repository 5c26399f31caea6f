"""Where a run trains: alone in its process, or on a seat of a pack that shares one base.

A run does not know which; it asks its place for what it would otherwise share with others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig

if TYPE_CHECKING:
    from lora_exp.model.loading import Base
    from lora_exp.record.progress import Board
    from lora_exp.training.answers import Answer

    # the trainer's numbers, the share of pairs preferred rightly, answers
    Measured = tuple[dict[str, float], float | None, list[Answer]]
    Measure = Callable[[], Measured]


class Place(Protocol):
    """What a run asks of where it trains."""

    name: str  # for the run's record

    def base(self, cfg: DictConfig) -> Base:
        """Return the base, which the run may put an adapter on."""

    def board(self) -> Board:
        """Return where the run's progress is shown."""

    def untrained(self, cfg: DictConfig, trainer: Any, measure: Measure) -> Measured:
        """Return what `measure` finds before training."""

    def join(self, trainer: Any) -> None:
        """Take a trainer about to measure and train."""

    def report(self) -> dict[str, Any]:
        """Return what the run's record keeps of its place once it is trained."""

    def leave(self) -> None:
        """Forget the run: it is over, or failed."""


class Alone:
    """A process of its own: nothing is shared."""

    name = "alone"

    def base(self, cfg: DictConfig) -> Base:
        """Load the base."""
        from lora_exp.model.loading import base_of
        from lora_exp.model.memory import reset_peak

        reset_peak()
        return base_of(cfg)

    def board(self) -> Board:
        """Return a progress bar."""
        from lora_exp.record.progress import Bar

        return Bar()

    def untrained(self, cfg: DictConfig, trainer: Any, measure: Measure) -> Measured:
        """Measure."""
        return measure()

    def join(self, trainer: Any) -> None:
        """Leave the trainer as it is."""

    def report(self) -> dict[str, Any]:
        """Return nothing: nothing was shared."""
        return {}

    def leave(self) -> None:
        """Give memory back: trainers hold themselves in cycles, and with them the base."""
        from lora_exp.model.memory import give_back

        gc.collect()
        give_back()


here: ContextVar[Place] = ContextVar("here", default=Alone())  # noqa: B039 (it has no state)
