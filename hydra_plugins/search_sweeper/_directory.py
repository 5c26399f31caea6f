"""The directory of a search: held by one process, and kept from other sweeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from lora_exp.errors import ConfigError
from lora_exp.files.lock import hold
from lora_exp.record.sweep import SUMMARY, SweepTable, read_rows
from lora_exp.search.journal import Journal

LOCK = ".search.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a search's directory between its launches, too.

    Raises:
        ConfigError: another process searches there.
    """
    try:
        lock = hold(folder / LOCK)
    except Timeout as error:
        text = f"another process searches in {folder}; wait for it, or take another directory"
        raise ConfigError([("hydra.sweep.dir", text)]) from error
    try:
        yield
    finally:
        lock.release()


def check_free(folder: Path, journal: Journal) -> None:
    """Refuse the directory of a sweep that is no search."""
    if not journal.asked and (folder / SUMMARY).is_file():
        text = f"{folder} holds a sweep that was no search; take another directory"
        raise ConfigError([("hydra.sweep.dir", text)])


def keep_rows(folder: Path) -> None:
    """Begin the table of a resumed search with the jobs of its earlier launches."""
    table, path = SweepTable.current, folder / SUMMARY
    if table is not None and path.is_file():
        rows = json.loads(path.read_text("utf-8"))
        known = {row["job"] for row in rows}  # the last hundredth may be missing after a kill
        rows += [row for row in read_rows(folder) if row["job"] not in known]
        table.rows = [row | {"directory": str((folder / row["job"]).absolute())} for row in rows]
