"""What a trainer has gathered since its last log line, kept in a checkpoint.

transformers and trl begin anew at a resume: the next means would be of fewer steps than those of a
run without it, and tokens would be counted from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_exp.parallel.world import world

FILE = "unlogged.json"


def save_unlogged(trainer: Any, folder: Path) -> None:
    """Write a trainer's sum of losses, its metrics and its count of tokens into a checkpoint."""
    values = {
        "loss": trainer._tr_loss.item(),
        "logged_step": trainer._globalstep_last_logged,
        "tokens": getattr(trainer, "_total_train_tokens", None),
        "metrics": getattr(trainer, "_metrics", {}).get("train", {}),
    }
    (folder / world.own(FILE)).write_text(json.dumps(values))


def restore_metrics(trainer: Any, folder: Path) -> None:
    """Set a trainer's metrics and its count of tokens; a clock that begins next leaves them out."""
    values = _read(folder)
    if values.get("tokens") is not None:
        trainer._total_train_tokens = values["tokens"]
    if values.get("metrics"):
        trainer._metrics["train"] |= values["metrics"]


def restore_loss(trainer: Any, folder: Path) -> None:
    """Set a trainer's sum of losses, which it sets to 0 before it calls its callbacks."""
    values = _read(folder)
    if values:
        trainer._tr_loss.fill_(values["loss"])
        trainer._globalstep_last_logged = values["logged_step"]


def _read(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint has; one of an earlier version has nothing."""
    path = folder / world.own(FILE)
    return dict(json.loads(path.read_text())) if path.is_file() else {}
