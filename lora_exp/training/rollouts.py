"""The answers that trl's trainers still learn from between two rollouts, in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_exp.adapter.untrusted import numbers_only
from lora_exp.errors import CheckpointError
from lora_exp.parallel.world import world

ROLLOUT = "rollout.pt"


def save_rollout(trainer: Any, folder: Path) -> None:
    """Save them, if the next step still learns from them."""
    inputs = getattr(trainer, "_buffered_inputs", None)
    period = getattr(trainer.args, "steps_per_generation", None) or 1
    period *= getattr(trainer, "num_iterations", 1)
    if inputs is not None and trainer._step % period:
        torch.save({"step": trainer._step, "inputs": inputs}, folder / world.own(ROLLOUT))


def load_rollout(trainer: Any, folder: Path) -> None:
    """Go on with them, if a checkpoint has them.

    Raises:
        CheckpointError: the file has something else than numbers.
    """
    path = folder / world.own(ROLLOUT)
    if path.is_file():
        with numbers_only(str(folder), CheckpointError):
            saved = torch.load(path, weights_only=True)
        trainer._step, trainer._buffered_inputs = saved["step"], saved["inputs"]
