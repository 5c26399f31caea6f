"""Deletes the checkpoints of runs, and says before what cannot be done afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.errors import ConfigError
from lora_exp.files.lock import Lock, in_use
from lora_exp.record.console import size
from lora_exp.runs.listing import size_of
from lora_exp.runs.run import DAMAGED, ENDED, SavedRun

FOLDER = "checkpoints"
SAVED = ("adapter", "model")


@dataclass(frozen=True)
class Deletion:
    """The checkpoints of a run, which may be deleted."""

    run: SavedRun
    size: int  # bytes
    consequence: str  # what cannot be done afterwards


@dataclass(frozen=True)
class Deletions:
    """What would be deleted, and which runs keep their checkpoints, and why."""

    deletions: Sequence[Deletion]
    kept: Sequence[tuple[SavedRun, str]]

    @property
    def size(self) -> int:
        """The bytes of all that would be deleted."""
        return sum(deletion.size for deletion in self.deletions)

    def text(self) -> str:
        """Return what would happen, a line for each run."""
        lines = [
            f"{d.run.directory / FOLDER}  {size(d.size)}; {d.consequence}" for d in self.deletions
        ]
        lines += [f"{run.directory / FOLDER}  stays: {why}" for run, why in self.kept]
        count = len(self.deletions)
        runs = "1 run" if count == 1 else f"{count} runs"
        return "\n".join(
            [*lines, f"checkpoints of {runs}, {size(self.size)} ({self.size:,} bytes)"]
        )


def plan_deletions(runs: Iterable[SavedRun], unfinished: bool) -> Deletions:
    """Return what would be deleted of runs that have checkpoints.

    Args:
        runs: those whose checkpoints are not needed any more.
        unfinished: also of runs that have not ended, which then cannot be resumed.
    """
    deletions, kept = [], []
    for run in runs:
        folder = run.directory / FOLDER
        if folder.is_symlink() or not folder.is_dir():
            continue
        if why := _reason_to_keep(run, unfinished):
            kept.append((run, why))
        else:
            deletions.append(Deletion(run, size_of(str(folder)), _consequence(run)))
    return Deletions(deletions, kept)


def delete(deletions: Deletions) -> tuple[int, list[str]]:
    """Delete checkpoints.

    Returns:
        The bytes that were deleted; what could not be deleted, and why.
    """
    deleted, failures = 0, []
    for deletion in deletions.deletions:
        folder = deletion.run.directory / FOLDER
        try:
            _delete(deletion.run.directory)
            deleted += deletion.size
        except ConfigError as error:  # it was resumed meanwhile
            failures.append(error.faults[0][1])
        except OSError as error:
            failures.append(f"{error.filename or folder}: {error.strerror}")
    return deleted, failures


def _delete(directory: Path) -> None:
    lock = Lock(directory, FOLDER)
    try:
        shutil.rmtree(directory / FOLDER)
    finally:
        lock.release()


def _reason_to_keep(run: SavedRun, unfinished: bool) -> str | None:
    if run.status == DAMAGED:
        return f"the run is damaged ({run.problem}); they may be all that is left of it"
    if in_use(run.directory):
        return "the run is in use"
    if run.record["status"] not in ENDED and not unfinished:
        return f"{run.record['status']}, it could still be resumed; --unfinished takes them, too"
    return None


def _consequence(run: SavedRun) -> str:
    if run.record["status"] not in ENDED:
        return f"{run.record['status']}: it cannot be resumed afterwards, and its weights are lost"
    texts = ["it cannot be trained further afterwards"]
    if not any((run.directory / name).is_dir() for name in SAVED):
        texts.append("its weights are lost")
    elif lost := _lost_best(run.record.get("best"), run.record.get("saved_step")):
        texts.append(f"the weights of its best evaluation, step {lost}, are lost")
    return "; ".join(texts)


def _lost_best(best: Any, saved_step: Any) -> int | None:
    """Return the step of the best evaluation if only a checkpoint has its weights."""
    if not isinstance(best, dict) or not best.get("checkpoint") or best.get("step") == saved_step:
        return None
    return best.get("step")
