"""Which checkpoints of a run are kept: the newest, and the best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lora_exp.training.best import Watched
from lora_exp.training.manifest import checkpoints_by_step, owner


def rotate(
    folder: Path,
    run: str,
    limit: int | None,
    best: int | None,
    watched: Watched,
    history: list[dict[str, Any]],
) -> None:
    """Delete a run's other checkpoints; transformers would count those of other runs, too.

    Args:
        folder: of the checkpoints.
        run: their owner.
        limit: how many of the newest are kept; None or 0: all.
        best: the step of the best checkpoint, as transformers knows it.
        watched: what decides which is best.
        history: what was logged.
    """
    if not limit or limit < 0:
        return
    checkpoints = checkpoints_by_step(folder).items()
    steps = {step: path for step, path in checkpoints if owner(path) == run}
    kept = watched.best(history, steps) or (None, 0.0)
    for step in sorted(steps)[:-limit]:
        if step not in (kept[0], best):
            shutil.rmtree(steps[step])
