"""Trainers whose processes have each a share of the optimizer's state, and save it themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_exp.errors import CheckpointError
from lora_exp.parallel.world import world

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class Shares:
    """A mixin for trainers: each process saves its own share, as numbers, and gets it back."""

    optimizer: Any
    lr_scheduler: Any

    def share(self) -> dict[str, Any]:
        """Return this process's share of the optimizer's state."""
        raise NotImplementedError

    def take_share(self, saved: dict[str, Any]) -> None:
        """Go on from a share that this process has saved."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        torch.save(self.share(), Path(output_dir) / world.own(OPTIMIZER))
        if world.is_first:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / world.own(OPTIMIZER)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; start a new run")
        self.take_share(torch.load(path, map_location="cpu", weights_only=True))
        path = Path(checkpoint) / SCHEDULER
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
