"""Random draws while several processes train one run: each its own, or dropout would repeat."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, set_seed

from lora_exp.parallel.world import world


class OwnDraws(TrainerCallback):  # type: ignore[misc]
    """Callback: each process has a random state of its own, once the order of rows is drawn."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed this process; a resumed one loads its state later."""
        if world.size > 1:
            set_seed(args.seed + world.rank)
