"""A table of saved runs: their values by key, selected, sorted, printed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_exp.errors import ConfigError, SavedError, did_you_mean
from lora_exp.runs.condition import OPTION, read_condition
from lora_exp.runs.gather import find_runs
from lora_exp.runs.run import SavedRun

COLUMNS = (
    "name", "status", "objective", "differs", "steps", "time", "size", "date", "sweep",
    "directory",
)  # fmt: skip
KEYS = (*COLUMNS, "judged_by", "goal", "problem")  # a row's own
USUAL = ("outputs", "multirun")
NOT_OF_A_RUN = ("tracking", "resume", "retry_failed", "hydra.")  # overrides that say nothing of it


@dataclass(frozen=True)
class Row:
    """A run in a listing."""

    run: SavedRun
    differs: Mapping[str, str]  # its overrides that not all listed runs have

    @cached_property
    def own(self) -> dict[str, Any]:
        """Its values by the keys of a row, except `size`, which takes a walk."""
        run = self.run
        return {
            "name": run.name,
            "status": run.status.partition(" ")[0],  # `killed`, without how it goes on
            "objective": run.objective,
            "differs": dict(self.differs),
            "steps": run.record.get("steps"),
            "time": run.record.get("metrics", {}).get("seconds"),
            "date": _date(run),
            "sweep": str(run.sweep) if run.sweep else None,
            "directory": str(run.directory),
            "judged_by": run.judged_by,
            "goal": run.goal,
            "problem": run.problem,
        }

    @cached_property
    def size(self) -> int:
        """The bytes of its directory."""
        return size_of(str(self.run.directory))

    def has(self, key: str) -> bool:
        """Return whether it has a value by this name."""
        return key in KEYS or any(key in values for values in self._others())

    def value(self, key: str) -> Any:
        """Return its value by a key: of the row, a metric, a count, or a key of the config.

        A group's name is its chosen option; None: it has none.
        """
        if key == "size":
            return self.size
        if key in self.own:
            return self.own[key]
        return next((values[key] for values in self._others() if key in values), None)

    def _others(self) -> Iterable[Mapping[str, Any]]:
        record = self.run.record
        for name in ("metrics", "counts", "choices"):
            values = record.get(name)
            yield values if isinstance(values, dict) else {}
        yield self.run.config()

    def known(self) -> set[str]:
        """Return all names that it has a value by."""
        return {*KEYS, *(str(key) for values in self._others() for key in values)}


def select(
    folders: Sequence[Path] | None,
    where: str | None = None,
    sort: str = "-date",
    columns: Sequence[str] = (),
) -> list[Row]:
    """Return the runs below folders for which a condition holds, sorted.

    Args:
        folders: None: those that runs and sweeps are written to.
        where: see `condition`; None: all.
        sort: see `sorted_rows`.
        columns: keys that will be shown; one that no run has is refused.

    Raises:
        ConfigError: the condition cannot be read, or no run has one of the keys.
        SavedError: a folder does not exist.
    """
    condition = read_condition(where) if where is not None else None
    rows = rows_of(find_runs(folders or _usual()))
    check_keys(rows, [sort.removeprefix("-")], "--sort")
    check_keys(rows, columns, "--columns")
    if condition is not None:
        check_keys(rows, condition.keys, OPTION)
        rows = [row for row in rows if condition.holds(row.value)]
    return sorted_rows(rows, sort)


def _usual() -> list[Path]:
    """Return the folders that runs and sweeps are written to."""
    folders = [folder for folder in map(Path, USUAL) if folder.is_dir()]
    if not folders:
        raise SavedError(f"there is no {' or '.join(USUAL)} here; give the folders of runs")
    return folders


def rows_of(runs: Sequence[SavedRun]) -> list[Row]:
    """Return a row for each run, with the overrides that tell it from the others."""
    counts = Counter(pair for run in runs for pair in run.overrides.items())
    return [
        Row(
            run,
            {
                key: value
                for key, value in run.overrides.items()
                if counts[key, value] < len(runs) and not key.startswith(NOT_OF_A_RUN)
            },
        )
        for run in runs
    ]


def check_keys(rows: Sequence[Row], keys: Iterable[str], option: str) -> None:
    """Refuse keys that no run has.

    Args:
        rows: all runs that were found.
        keys: as they were given.
        option: the one that they were given to.

    Raises:
        ConfigError: it names near keys.
    """
    wrong = [key for key in dict.fromkeys(keys) if not any(row.has(key) for row in rows)]
    if wrong and rows:
        known = set().union(*(row.known() for row in rows))
        texts = (f"no run has {key!r}{did_you_mean(key, known)}" for key in wrong)
        raise ConfigError((option, text) for text in texts)


def sorted_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """Sort rows by a key; with a minus before it the largest comes first, without a value last."""
    descending, name = key.startswith("-"), key.removeprefix("-")
    valued = [row for row in rows if row.value(name) is not None]
    valued.sort(key=lambda row: _order(row.value(name)), reverse=descending)
    return valued + [row for row in rows if row.value(name) is None]


def as_json(rows: Iterable[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows for programs: all keys of a row, and the columns that were asked for."""
    keys = dict.fromkeys((*KEYS, *columns))
    return [{key: row.value(key) for key in keys} for row in rows]


def size_of(folder: str) -> int:
    """Return the bytes of the files in and below a folder; what cannot be read counts nothing."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                total += size_of(entry.path) if is_folder else _file_size(entry)
    except OSError:
        pass
    return total


def _file_size(entry: os.DirEntry[str]) -> int:
    return entry.stat(follow_symlinks=False).st_size


def _order(value: Any) -> tuple[bool, Any]:
    """Return a key that sorts numbers before texts."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else str(value)


def _date(run: SavedRun) -> str | None:
    """Return when it began, in UTC as ISO 8601 writes it; of earlier versions, its last change."""
    if started := run.record.get("started"):
        return str(started)
    try:
        changed = (run.directory / "config.yaml").stat().st_mtime
    except OSError:
        changed = _changed(run.directory)
    return datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")


def _changed(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
