"""Send the offline W&B runs below a folder, the parts of a resumed run in their order."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lora_exp.errors import SavedError

PART = re.compile(r"offline-run-(\d{8}_\d{6})-(.+)$")  # when it began, and the run's id


def offline_parts(folder: Path, aside: re.Pattern[str]) -> list[Path]:
    """Return the directories of all offline parts below a run, a sweep or several.

    Those of one run follow each other, the oldest first.

    Args:
        folder: where to look.
        aside: matches names of runs that were set aside, which are no longer part of a sweep.

    Raises:
        SavedError: there are none.
    """
    paths = [p for p in folder.rglob("wandb/offline-run-*") if PART.match(p.name) and p.is_dir()]
    kept = [p for p in paths if not any(aside.search(name) for name in p.parts)]
    if not kept:
        raise SavedError(f"{folder} has no offline W&B runs")
    return sorted(kept, key=lambda path: (path.parent, run_id(path), path.name))


def run_id(part: Path) -> str:
    """Return the id of a part's run."""
    match = PART.match(part.name)
    assert match is not None
    return match[2]


def is_sent(part: Path) -> bool:
    """Return whether W&B has marked a part as sent."""
    return any(part.glob("*.wandb.synced"))


def send(parts: Iterable[Path]) -> bool:
    """Send the parts that have not been sent, by `wandb sync`, which prints where they go.

    Returns:
        Whether all are sent now.
    """
    parts = list(parts)
    waiting = [str(part) for part in parts if not is_sent(part)]
    if waiting:
        subprocess.run([sys.executable, "-m", "wandb", "sync", *waiting], check=False)
    return all(map(is_sent, parts))
