"""A checkpoint's manifest: its run, its step, and the hash of each of its files. Needs no torch."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from lora_exp.files.whole import clear, sha256

log = logging.getLogger("lora_exp")
MANIFEST, PREFIX = "manifest.json", "checkpoint-"


def _hashed_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def seal(folder: Path, run: str, step: int) -> None:
    """Write a checkpoint's manifest: its run, its step and the hash of each of its files."""
    files = {str(path.relative_to(folder)): sha256(path) for path in _hashed_files(folder)}
    text = json.dumps({"run": run, "step": step, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def flaw(folder: Path, run: str) -> str | None:
    """Return why a run cannot resume from a checkpoint, or None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, saved_run, step = manifest["files"], manifest["run"], manifest["step"]
        present = {str(path.relative_to(folder)): path for path in _hashed_files(folder)}
        present = {name: path for name, path in present.items() if not name.startswith(".")}
        if missing := sorted(files.keys() - present.keys()):
            return f"lacks {', '.join(missing)}"
        if extra := sorted(present.keys() - files.keys()):
            return f"has files that it was not saved with: {', '.join(extra)}"
        if changed := [name for name in files if sha256(present[name]) != files[name]]:
            return f"is damaged: {', '.join(changed)} changed since it was written"
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    if saved_run != run or folder.name != f"{PREFIX}{step}":
        return "belongs to another run"
    return None


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder, of any run: step -> path."""
    names = {path.name.removeprefix(PREFIX): path for path in folder.glob(f"{PREFIX}*")}
    return {int(name): path for name, path in names.items() if name.isdigit()}


def owner(folder: Path) -> str | None:
    """Return the run that a checkpoint's manifest names, or None."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(folder: Path, run: str) -> tuple[Path | None, int]:
    """Return the newest intact checkpoint of a run, and its step.

    Newer ones that are damaged or of another run are reported once and renamed.
    """
    clear(folder)
    checkpoints = checkpoints_by_step(folder)
    for step in sorted(checkpoints, reverse=True):
        path = checkpoints[step]
        reason = flaw(path, run)
        if reason is None:
            return path, step
        aside = path.with_name(f"unused-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log.warning("%s %s; it is set aside as %s", path, reason, aside.name)
    return None, 0
