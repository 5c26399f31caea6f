"""Runs that have an objective, as points of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.comparison.scale import inside, limits
from lora_exp.comparison.theme import PAPER, colour, rounded, symbol
from lora_exp.runs.run import SavedRun

EDGE = "At the edge: out of the picture."


@dataclass(frozen=True)
class Series:
    """A group of runs as figures show it: its label is fit for plotly."""

    label: str
    values: Mapping[str, Any]
    runs: Sequence[SavedRun]


@dataclass(frozen=True)
class Point:
    """A run with an objective.

    Attributes:
        run: the run.
        place: of its group, the best first.
        label: of its group.
        values: of its group, by key.
        objective: its value.
        shown: the same, or the edge of the picture if it is far from those of finished runs.
    """

    run: SavedRun
    place: int
    label: str
    values: dict[str, Any]
    objective: float
    shown: float

    @property
    def pruned(self) -> bool:
        """Whether it was stopped early, so that its value is not that of a whole run."""
        return self.run.record.get("status") == "pruned"


def points(groups: Sequence[Series]) -> list[Point]:
    """Return the runs that have an objective, the best group first."""
    runs = [
        (place, group, run, run.objective)
        for place, group in enumerate(groups)
        for run in group.runs
        if run.objective is not None
    ]
    if not runs:
        return []
    finished = [value for *_, run, value in runs if run.record.get("status") == "finished"]
    shown = limits(finished if len(finished) > 1 else [value for *_, value in runs])
    return [
        Point(run, place, group.label, dict(group.values), value, rounded(inside(value, shown)))
        for place, group, run, value in runs
    ]


def caption(text: str, points: Sequence[Point]) -> str:
    """Return a caption that also says what hollow points and those at the edge are."""
    if any(point.pruned for point in points):
        text += " Hollow: stopped early."
    return f"{text} {EDGE}" if any(p.shown != rounded(p.objective) for p in points) else text


def marks(points: Sequence[Point]) -> dict[str, Any]:
    """Return the markers of runs: their group's colour and symbol, hollow if stopped early."""
    colours = [colour(point.place) for point in points]
    return {
        "size": 9,
        "symbol": [symbol(point.place) for point in points],
        "color": [PAPER if p.pruned else c for p, c in zip(points, colours, strict=True)],
        "line": {"width": 1.5, "color": colours},
    }
