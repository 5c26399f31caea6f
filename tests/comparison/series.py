"""Groups of runs for tests of figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_exp.comparison.points import Series
from lora_exp.runs.run import SavedRun


def run(
    objective: float | None = 1.0,
    history: Sequence[tuple[int, float]] = (),
    status: str = "finished",
    metrics: dict[str, Any] | None = None,
    name: str = "run",
    **record: Any,
) -> SavedRun:
    """Return a run judged by eval/loss, as if it had been read; `history` is of eval/loss."""
    values = {
        "name": name, "status": status, "objective": "eval/loss", "goal": "minimize",
        "metrics": {"eval/loss": objective, **(metrics or {})}, **record,
    }  # fmt: skip
    made = SavedRun(Path("/nowhere"), values)
    made.__dict__["_history"] = [{"step": step, "eval/loss": value} for step, value in history]
    return made


def series(*runs: SavedRun, label: str = "group", **values: Any) -> Series:
    """Return a group; `peft__r=4` is its value of `peft.r`."""
    return Series(label, {key.replace("__", "."): value for key, value in values.items()}, runs)
