"""Gathers the runs below folders: single runs, jobs of sweeps, damaged ones too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_exp.errors import SavedError
from lora_exp.files.paths import near_names
from lora_exp.record.standing import ASIDE
from lora_exp.runs.run import CONFIG, METRICS, RECORD, SavedRun, read_run

NOT_WALKED = {"checkpoints", "adapter", "model", "wandb", "node_modules", "__pycache__"}
DIGITS = re.compile(r"(\d+)")


def find_runs(folders: Iterable[Path]) -> list[SavedRun]:
    """Return the runs in and below folders, once each; job 2 comes before job 10.

    Links are not followed, and directories that a sweep has set aside are left out.

    Raises:
        SavedError: a folder does not exist, or is a file.
    """
    runs: dict[str, SavedRun] = {}  # by real path
    for folder in folders:
        real = os.path.realpath(_checked(folder))
        for directory, problem in _walk(str(folder)):
            path = real + directory.removeprefix(str(folder))
            if path not in runs:
                found = Path(directory)
                runs[path] = SavedRun(found, {}, problem) if problem else read_run(found)
    return sorted(runs.values(), key=lambda run: _natural(str(run.directory)))


def read_runs(paths: Iterable[str | Path]) -> list[SavedRun]:
    """Return the runs at paths, each a run, a sweep, or a folder of them.

    Raises:
        SavedError: a path has no run, or does not exist.
    """
    folders = [Path(path).expanduser() for path in paths]
    for folder in folders:
        if not find_runs([folder]):
            raise SavedError(f"{folder}: no run is in it or below it (a run has a {RECORD})")
    return find_runs(folders)


def _checked(folder: Path) -> Path:
    if not folder.exists():
        raise SavedError(f"{folder}: there is no such folder{near_names(folder)}")
    if not folder.is_dir():
        raise SavedError(f"{folder} is a file; name the folder of a run or of a sweep")
    return folder


def _walk(folder: str) -> Iterator[tuple[str, str | None]]:
    """Yield each run's directory, and what is wrong with one that cannot be looked into."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except OSError as error:
        yield folder, f"the folder cannot be read ({error.strerror})"
        return
    names = {entry.name for entry in entries}
    if RECORD in names or {METRICS, CONFIG} <= names:
        yield folder, None
        return
    for entry in entries:
        is_walked = not (entry.name.startswith(".") or entry.name in NOT_WALKED)
        if is_walked and entry.is_dir(follow_symlinks=False) and not ASIDE.search(entry.name):
            yield from _walk(entry.path)


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in a text by their value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in DIGITS.split(text)]
