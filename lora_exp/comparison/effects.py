"""The objective against each key that varies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.comparison.importance import importances
from lora_exp.comparison.keys import text_of
from lora_exp.comparison.points import Point, caption, marks
from lora_exp.comparison.scale import Axis
from lora_exp.comparison.theme import MUTED, Figure, figure, plain, rounded

KEYS = 9  # that are drawn: the most important ones
COLUMNS = 3
PANEL = 300  # pixels, its height


def by_key(points: Sequence[Point], metric: str) -> Figure | None:
    """Return the objective against each varied key, a panel each; None: no key varies."""
    shares = importances(points)
    keys = list(shares)[:KEYS]
    if not keys or len(points) < 2:
        return None
    columns = min(COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    gap = {"xgap": 0.1, "ygap": 0.45 if rows > 1 else 0.1}
    grid = {"rows": rows, "columns": columns, "pattern": "independent", **gap}
    layout: dict[str, Any] = {"grid": grid}
    data: list[dict[str, Any]] = []
    for i, key in enumerate(keys):
        suffix = str(i + 1) if i else ""
        axis = Axis([point.values for point in points], key)
        data += [
            trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            for trace in _panel(points, key, axis)
        ]
        layout[f"xaxis{suffix}"] = {**axis.layout, "title": {"text": plain(key)}}
        is_first = i % columns == 0
        layout[f"yaxis{suffix}"] = {
            "showticklabels": is_first,
            **({"matches": "y"} if i else {}),
            **({"title": {"text": plain(metric)}} if is_first else {}),
        }
    text = "A point is a run; the dotted line leads through the means of finished runs."
    if len(shares) > len(keys):
        text += f" {len(shares) - len(keys)} keys that explain less are not drawn."
    return figure(
        "The objective against each key", caption(text, points), data, **layout,
        height=60 + PANEL * rows, showlegend=False,
    )  # fmt: skip


def _panel(points: Sequence[Point], key: str, axis: Axis) -> list[dict[str, Any]]:
    """Return the traces of one key: its runs, and the mean of each value."""
    parts: dict[float, list[float]] = {}
    for at, point in zip(axis.at, points, strict=True):
        if not point.pruned:
            parts.setdefault(at, []).append(point.shown)
    means = {at: sum(part) / len(part) for at, part in sorted(parts.items())}
    values = [plain(text_of(point.values, key)) for point in points]
    runs = {
        "type": "scatter", "mode": "markers", "marker": marks(points),
        "x": axis.apart(), "y": [point.shown for point in points],
        "text": [f"{point.label}: <b>{point.objective:.4g}</b>" for point in points],
        "customdata": [f"{plain(key)} = {value}" for value in values],
        "meta": {"groups": [point.place for point in points]},
        "hovertemplate": "%{text}<br>%{customdata}<extra></extra>",
    }  # fmt: skip
    line = {
        "type": "scatter", "mode": "lines+markers", "x": list(means),
        "y": [rounded(mean) for mean in means.values()],
        "line": {"color": MUTED, "width": 1.5, "dash": "dot"},
        "marker": {"symbol": "line-ew", "size": 22, "line": {"color": MUTED, "width": 2}},
        "hovertemplate": "mean: <b>%{y}</b><extra></extra>",
    }  # fmt: skip
    repeated = len(means) > 1 and sum(map(len, parts.values())) > len(means)
    return [line, runs] if repeated else [runs]
