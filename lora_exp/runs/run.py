"""A saved run as its directory describes it; what takes longer to read is read when asked for."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config.overrides import split_override
from lora_exp.record.standing import status_text

RECORD, METRICS, CONFIG, SAMPLES = "run.json", "metrics.jsonl", "config.yaml", "samples.jsonl"
ROW_LOSSES, PAIRS, UPDATES = "row_losses.json", "pairs.json", "updates.json"
OVERRIDES = Path(".hydra") / "overrides.yaml"
OF_SWEEP = ("sweep.json", "multirun.yaml")  # either marks the folder of a sweep
DAMAGED = "damaged"  # the status of a run whose record cannot be read
ENDED = ("finished", "pruned")  # statuses of runs that have a value
BLOCK = re.compile(r"^(?=[\w\"'])", re.M)  # where a key of the top level begins
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run on disk: its record, and config, metrics and samples when they are asked for.

    Attributes:
        directory: the run's.
        record: run.json; empty if it is damaged.
        problem: what is wrong with a damaged directory, in one line.
    """

    directory: Path
    record: Mapping[str, Any]
    problem: str | None = None

    @property
    def name(self) -> str:
        """The run's name; of a damaged one, its folder's."""
        return str(self.record.get("name") or self.directory.name)

    @cached_property
    def status(self) -> str:
        """Its status for people; `damaged` if its record cannot be read."""
        if self.problem:
            return DAMAGED
        status = str(self.record["status"])
        with suppress(OSError, ValueError, KeyError):  # changed since it was read
            return status_text(self.directory) if status == "running" else status
        return status

    @property
    def judged_by(self) -> str | None:
        """The objective's name; None: it is not known before the run has ended."""
        name = self.record.get("objective")
        return None if name is None else str(name)

    @property
    def objective(self) -> float | None:
        """The objective's value; None: the run has not ended, or the value is not a number."""
        if self.record.get("status") not in ENDED:
            return None
        return number(self.record["metrics"].get(self.judged_by))

    @property
    def goal(self) -> str | None:
        """`minimize` or `maximize`."""
        goal = self.record.get("goal")
        return None if goal is None else str(goal)

    @cached_property
    def sweep(self) -> Path | None:
        """The folder of the sweep that it is a job of."""
        parent = self.directory.parent
        return parent if any((parent / name).is_file() for name in OF_SWEEP) else None

    @cached_property
    def overrides(self) -> dict[str, str]:
        """The overrides of its command line, as text; a deleted key has the value ''."""
        values = _parsed(_text(self.directory / OVERRIDES))
        return dict(map(split_override, map(str, values))) if isinstance(values, list) else {}

    @property
    def seed(self) -> int | None:
        """The seed; None: its config is missing."""
        seed = self.config().get("seed")
        return seed if isinstance(seed, int) else None

    def config(self) -> dict[str, Any]:
        """Return its config as values by dotted key; empty if it cannot be read."""
        return self._config

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a number that was not finite is None."""
        return self._history

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of samples.jsonl."""
        return self._samples

    def row_losses(self) -> dict[str, tuple[float, int]]:
        """Return of each held-out row the sum of its tokens' losses, and how many tokens count.

        Equal rows are one, with the losses and tokens of all. Empty: they are not recorded.
        """
        return self._row_losses

    @cached_property
    def _row_losses(self) -> dict[str, tuple[float, int]]:
        rows: dict[str, tuple[float, int]] = {}
        try:
            columns = json.loads(_text(self.directory / ROW_LOSSES))
            names = (columns[name] for name in ("rows", "losses", "tokens"))
            for row, loss, tokens in zip(*names, strict=True):
                before = rows.get(row, (0.0, 0))
                rows[row] = (before[0] + loss, before[1] + tokens)
        except (ValueError, TypeError, KeyError, RecursionError):  # none, damaged, or not finite
            return {}
        return rows

    def preferences(self) -> dict[tuple[str, int], bool]:
        """Return of each held-out pair, and of which of equal ones, whether the model prefers it.

        Empty: they are not recorded.
        """
        return self._preferences

    @cached_property
    def _preferences(self) -> dict[tuple[str, int], bool]:
        seen: Counter[str] = Counter()
        preferred: dict[tuple[str, int], bool] = {}
        try:
            columns = json.loads(_text(self.directory / PAIRS))
            for pair, is_preferred in zip(columns["pairs"], columns["preferred"], strict=True):
                preferred[pair, seen[pair]] = bool(is_preferred)
                seen[pair] += 1
        except (ValueError, TypeError, KeyError, RecursionError):  # none, or damaged
            return {}
        return preferred

    def updates(self) -> dict[str, float]:
        """Return the norm of each module's update; empty: none are recorded."""
        return self._updates

    @cached_property
    def _updates(self) -> dict[str, float]:
        try:
            values = json.loads(_text(self.directory / UPDATES))
            norms = {str(name): number(norm) for name, norm in values.items()}
        except (ValueError, AttributeError, RecursionError):  # none, or damaged
            return {}
        return {name: norm for name, norm in norms.items() if norm is not None}

    @cached_property
    def _config(self) -> dict[str, Any]:
        blocks = BLOCK.split(_text(self.directory / CONFIG))
        return {key: value for block in blocks for key, value in _flat_block(block)}

    @cached_property
    def _history(self) -> list[dict[str, Any]]:
        return _lines(self.directory / METRICS)

    @cached_property
    def _samples(self) -> list[dict[str, Any]]:
        return _lines(self.directory / SAMPLES)


def read_run(directory: Path) -> SavedRun:
    """Read a run's record; a damaged one is described, never an error."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SavedRun(directory, {}, f"{RECORD} is missing")
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        return SavedRun(directory, {}, f"{RECORD} cannot be read ({text})")
    except RecursionError:
        return SavedRun(directory, {}, f"{RECORD} cannot be read (nested too deeply)")
    if not isinstance(record, dict) or not isinstance(record.get("status"), str):
        return SavedRun(directory, {}, f"{RECORD} is not the record of a run: it has no status")
    if not isinstance(record.get("metrics"), dict):
        return SavedRun(directory, {}, f"{RECORD} is not the record of a run: it has no metrics")
    return SavedRun(directory, record)


def number(value: Any) -> float | None:
    """Return a value as a float if it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    with suppress(OverflowError):  # an int beyond a float's range
        return float(value) if is_number and math.isfinite(value) else None
    return None


def flattened(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values as pairs of dotted key and value; an empty mapping is a value."""
    if not isinstance(values, Mapping) or not values:
        return [(prefix, values)]
    pairs = ((f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in values.items())
    return [pair for key, inner in pairs for pair in flattened(inner, key)]


@lru_cache(maxsize=4096)
def _flat_block(block: str) -> tuple[tuple[str, Any], ...]:
    """Return the pairs of one key of the top level; runs of one sweep share most of them."""
    values = _parsed(block)
    return tuple(flattened(values)) if isinstance(values, dict) else ()


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError):  # cut off, or not ours
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; one cut off while it was written is skipped."""
    objects: list[dict[str, Any]] = []
    for line in _text(path).split("\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects
