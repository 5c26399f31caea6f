"""Checkpoints that are whole or absent: written aside, hashed, flushed to the disk, then renamed.

Knows files and trainers' methods, nothing of configs. What a checkpoint must hold to go on from it
bit for bit is transformers' own list, and what trainers of rollouts add.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import rotate_checkpoints

from lora_exp.disk import refusal
from lora_exp.errors import CheckpointError
from lora_exp.foreign import numbers_only
from lora_exp.guard import check_finite

log = logging.getLogger("lora_exp")
MANIFEST, ROLLOUT = "manifest.json", "rollout.pt"
PREFIX, STAGE = "checkpoint-", ".staged"


def sha256(path: Path) -> str:
    """Return a file's hash."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the disk hold what was written: a file's bytes, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """Give a folder to write aside, and put it in its place when all of it is on the disk.

    Raises:
        CheckpointError: the disk does not take it; what lay in its place still does.
    """
    room = final.parent / f"{STAGE}-{final.name}"
    shutil.rmtree(room, ignore_errors=True)
    made, old = room / final.name, room / "old"
    made.mkdir(parents=True)
    try:
        yield made
        for path in (*made.rglob("*"), made):
            _flush(path)
        if final.exists():
            final.rename(old)
        made.rename(final)
        _flush(final.parent)
    except Exception as error:
        if (full := refusal(error, final)) is not None:
            raise full from error
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def seal(folder: Path, run: str, step: int) -> None:
    """Write a checkpoint's manifest: whose it is, and the hash of each of its files."""
    files = {str(path.relative_to(folder)): sha256(path) for path in _files(folder)}
    text = json.dumps({"run": run, "step": step, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def flaw(folder: Path, run: str) -> str | None:
    """Return why a run cannot go on from a checkpoint, or None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, owner, step = manifest["files"], manifest["run"], manifest["step"]
        there = {str(path.relative_to(folder)): path for path in _files(folder)}
        there = {name: path for name, path in there.items() if not name.startswith(".")}
        if lost := sorted(files.keys() - there.keys()):
            return f"lacks {', '.join(lost)}"
        if more := sorted(there.keys() - files.keys()):
            return f"has files that it was not saved with: {', '.join(more)}"
        if changed := [name for name in files if sha256(there[name]) != files[name]]:
            return f"is damaged: {', '.join(changed)} changed since it was written"
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    if owner != run or folder.name != f"{PREFIX}{step}":
        return "belongs to another run"
    return None


def newest(folder: Path, run: str) -> tuple[Path | None, int]:
    """Return the newest checkpoint that is whole and the run's own, and its step.

    Others that are newer are named once, and renamed, so that nothing takes them for good.
    """
    for stale in folder.glob(f"{STAGE}*"):
        shutil.rmtree(stale, ignore_errors=True)
    numbered = {
        int(path.name.removeprefix(PREFIX)): path
        for path in folder.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit()
    }
    for step in sorted(numbered, reverse=True):
        path = numbered[step]
        wrong = flaw(path, run)
        if wrong is None:
            return path, step
        aside = path.with_name(f"unused-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log.warning("%s %s; it is set aside as %s", path, wrong, aside.name)
    return None, 0


class Checkpoints:
    """What every trainer gains: checkpoints that are whole or absent, the best one kept."""

    run = ""  # whose checkpoints these are
    model: Any
    state: Any
    args: Any
    _stage: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or super()._get_output_dir(trial))  # type: ignore[misc]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: trl would, at every checkpoint; the run's own comes with its adapter."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        check_finite(self.model.named_parameters(), step)
        folder = Path(self._get_output_dir(trial))
        self._find_best(folder)
        with whole(folder / f"{PREFIX}{step}") as made:
            self._stage = made.parent
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._stage = None
            self._save_rollout(made)
            if self._find_best(folder, step):
                self.state.save_to_json(str(made / "trainer_state.json"))
            seal(made, self.run, step)
        rotate_checkpoints(
            str(folder), self.args.save_total_limit, self.state.best_model_checkpoint
        )

    def _find_best(self, folder: Path, step: int | None = None) -> bool:
        """Say where the best checkpoint lies: here, wherever the run's directory was then."""
        best = self.state.best_global_step
        path = folder / f"{PREFIX}{best}"
        if best and (best == step or path.is_dir()):
            self.state.best_model_checkpoint = str(path)
        return bool(best) and best == step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with numbers_only(checkpoint, CheckpointError):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._find_best(Path(checkpoint).parent)
            self._load_rollout(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with numbers_only(checkpoint, CheckpointError):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _save_rollout(self, folder: Path) -> None:
        """Save the answers that trl's trainers still learn from, between two rollouts."""
        inputs = getattr(self, "_buffered_inputs", None)
        every = getattr(self.args, "steps_per_generation", None) or 1
        every *= getattr(self, "num_iterations", 1)
        if inputs is not None and self._step % every:
            torch.save({"step": self._step, "inputs": inputs}, folder / ROLLOUT)

    def _load_rollout(self, folder: Path) -> None:
        if (folder / ROLLOUT).is_file():
            saved = torch.load(folder / ROLLOUT, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["inputs"]


@cache
def checkpointed(trainer: type) -> type:
    """Return a trainer's class with `Checkpoints` before it."""
    return type(trainer.__name__, (Checkpoints, trainer), {"__module__": trainer.__module__})
