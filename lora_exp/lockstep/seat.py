"""A job's place in a pack: the `Place` interface of training/place.py."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any, TypeVar

from omegaconf import DictConfig

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.lockstep.pack import Pack, Shared
from lora_exp.model.loading import Base
from lora_exp.record.progress import Board
from lora_exp.training.untrained import Content, Measure, Measured, is_random, settings

T = TypeVar("T")


class Seat:
    """A job's place in a pack."""

    def __init__(
        self,
        pack: Pack,
        index: int,
        board: Board,
        job: int = 0,
        bracket: Bracket | None = None,
        settled: DictConfig | None = None,
    ) -> None:
        """Create the place of a job.

        Args:
            pack: the job's.
            index: of the job in its pack.
            board: the job's row of the pack's table.
            job: its number in the sweep.
            bracket: the jobs that it is compared with; some may be in other packs.
            settled: its config, if the launcher has settled and validated it.
        """
        self.pack, self.index, self._board = pack, index, board
        self.job, self.bracket, self.settled = job, bracket, settled
        self._held: list[Shared] = []
        self.name = f"lockstep, {pack.mode}"

    def base(self, cfg: DictConfig) -> Base:
        """Return a copy of the pack's base that shares its weights."""
        return self.pack.base(cfg)

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Return what the pack's jobs with an equal key share while one of them needs it."""
        shared = self.pack.shared.get(key)
        if shared is None:
            shared = self.pack.shared[key] = Shared(make())
        self._held.append(shared)
        value: T = shared.value
        return value

    def board(self) -> Board:
        """Return the job's row of the pack's table."""
        return self._board

    def untrained(
        self, cfg: DictConfig, trainer: Any, measure: Measure, content: Content
    ) -> Measured:
        """Measure once for all jobs with equal settings: LoRA's update is zero before training."""
        if is_random(cfg) or (cfg.peft or {}).get("init_lora_weights", True) is not True:
            results = measure()
        else:
            key = json.dumps(settings(cfg), sort_keys=True)
            if key in self.pack.measured:
                results = self.pack.measured[key]
                if results[0]:
                    trainer.log(dict(results[0]))  # as it does when it measures itself
            else:
                self.pack.measured[key] = results = measure()
        self.pack.widen()
        return results

    def join(self, trainer: Any) -> None:
        """Share the pack's passes from here on."""
        self.pack.join(self.index, trainer)

    def seconds(self) -> float:
        """Return the job's share of the pack's seconds."""
        return self.pack.hub.seconds(self.index)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or nothing can bring it about while the job waits."""
        self.pack.hub.wait_for(self.index, condition)

    def report(self) -> dict[str, Any]:
        """Return how the pack's passes were shared and verified so far."""
        why_apart = {"why_apart": self.pack.why_apart(self.index)}
        return {"lockstep": self.pack.passes.report() | why_apart}

    def leave(self) -> None:
        """Free the seat; if other jobs wait for it, also collect the job's garbage."""
        self.pack.leave(self.index)
        self._held.clear()
        if self.pack.hub.queued:
            gc.unfreeze()
            gc.collect()
