"""Whether two runs left the same: weights byte for byte, and every metric but those of time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.after.saved import read_json
from lora_exp.files.whole import sha256

WEIGHTS = ("adapter", "model", "value")  # the folders of what was trained
TIMED = (
    "seconds",
    "_per_s",
    "step_time",
    "peak_bytes",
)  # how metrics end that no two trainings share
INPUTS = ("data", "base", "base_files", "adapters", "template")


@dataclass(frozen=True)
class Likeness:
    """What is the same, and what differs, a text for each difference."""

    files: int  # of the weights, which were compared
    numbers: int  # of the metrics, which were compared
    weights: list[str]
    metrics: list[str]
    inputs: list[str]  # data and base, as they were loaded

    @property
    def same(self) -> bool:
        """Return whether all that was compared is the same."""
        return not self.weights + self.metrics


def likeness(run: Path, other: Path) -> Likeness:
    """Compare a run with another training of it.

    Args:
        run: its directory.
        other: that of the other training.
    """
    records = read_json(run / "run.json"), read_json(other / "run.json")
    files = {name for folder in (run, other) for name in _trained(folder)}
    weights = [text for name in sorted(files) if (text := _file_difference(run, other, name))]
    numbers, metrics = _metrics(run, other, records)
    inputs = [
        f"{key} was {records[0][key]}, now {records[1].get(key)}"
        for key in INPUTS
        if key in records[0] and records[0][key] != records[1].get(key)
    ]
    return Likeness(len(files), numbers, weights, metrics, inputs)


def _trained(run: Path) -> Iterator[str]:
    """Yield the files of what was trained, relative to the run."""
    for name in WEIGHTS:
        for path in (run / name).rglob("*"):
            if path.is_file():
                yield str(path.relative_to(run))


def _file_difference(run: Path, other: Path, name: str) -> str | None:
    for folder, text in ((run, "is only in the new one"), (other, "is missing in the new one")):
        if not (folder / name).is_file():
            return f"{name} {text}"
    return f"{name} differs" if sha256(run / name) != sha256(other / name) else None


def _metrics(
    run: Path, other: Path, records: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> tuple[int, list[str]]:
    """Return how many numbers were compared, and which differ."""
    pairs = [_values(folder, record) for folder, record in zip((run, other), records, strict=True)]
    # a run that went on without its rule has rungs on record that no training measures any more
    passed_over = {name for name in pairs[0].keys() ^ pairs[1].keys() if name.startswith("rung ")}
    names = [name for name in pairs[0] | pairs[1] if name not in passed_over]
    differences = [
        f"{name}: {pairs[0].get(name)}, now {pairs[1].get(name)}"
        for name in names
        if name not in pairs[0] or name not in pairs[1] or pairs[0][name] != pairs[1][name]
    ]
    by_row = {"samples.jsonl": "answers", "row_losses.json": "losses", "pairs.json": "preferences"}
    for name, what in by_row.items():
        texts = [_text(folder / name) for folder in (run, other)]
        if texts[0] != texts[1] and (run / name).is_file():  # an earlier version wrote fewer
            differences.append(f"{name}: other {what}")
    return len(names), differences


def _values(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's numbers: of each line of metrics.jsonl, of rungs, and of its record."""
    lines = _lines(run)
    numbers = {
        f"{key} at step {line['step']}": value for line in lines for key, value in line.items()
    }
    for rung in record.get("rungs") or ():
        numbers[f"rung {rung['rung']}"] = [rung.get("step"), rung.get("value")]
    numbers |= record["metrics"] | {"steps": record.get("steps")}
    return {name: value for name, value in numbers.items() if not _is_timed(name)}


def _is_timed(name: str) -> bool:
    return name.partition(" at step ")[0].endswith(TIMED)


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(run / "metrics.jsonl").split("\n") if line]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
