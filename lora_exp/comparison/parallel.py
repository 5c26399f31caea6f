"""Parallel coordinates: runs as lines through their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.comparison.effects import KEYS
from lora_exp.comparison.importance import importances
from lora_exp.comparison.points import Point, caption
from lora_exp.comparison.scale import Axis
from lora_exp.comparison.theme import COLOURS, MUTED, PAPER, TEXT, Figure, colour, figure, plain


def parallel(points: Sequence[Point], metric: str, goal: str) -> Figure | None:
    """Return parallel coordinates: a line for each run through its values to its objective.

    Lines, not plotly's own `parcoords`: those need WebGL, cannot be printed, and show no names.
    """
    keys = list(importances(points))[:KEYS]
    if len(keys) < 2 or len(points) < 3:
        return None
    order = sorted(points, key=lambda p: p.objective, reverse=goal == "maximize")
    axes = [Axis([point.values for point in order], key) for key in keys]
    axes.append(Axis([{metric: point.shown} for point in order], metric))
    axes[-1].layout = {}
    heights = [_heights(axis, len(order), last=axis is axes[-1]) for axis in axes]
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "x": list(range(len(axes))),
            "y": [height[i] for height in heights],
            "line": {"color": colour(point.place), "shape": "spline", "smoothing": 0.5,
                     "width": 2 if point.place < len(COLOURS) else 1,
                     "dash": "dot" if point.pruned else "solid"},
            "marker": {"size": 5}, "opacity": 1 if point.place < len(COLOURS) else 0.7,
            "meta": {"group": point.place, "name": point.label, "value": f"{point.objective:.4g}"},
            "hovertemplate": "%{meta.name}: <b>%{meta.value}</b><extra></extra>",
        }
        for i, point in reversed(list(enumerate(order)))  # the best on top
    ]  # fmt: skip
    names = [*map(plain, keys), f"<b>{plain(metric)}</b>"]
    return figure(
        "Parallel coordinates",
        caption("A line is a run; the keys stand in the order of their importance.", points), data,
        showlegend=False, height=440, annotations=_scales(axes),
        xaxis={"tickvals": list(range(len(axes))), "ticktext": names, "showgrid": True,
               "gridcolor": MUTED, "showline": False, "side": "top", "fixedrange": True,
               "range": [-0.25, len(axes) - 0.75], "tickfont": {"color": TEXT}},
        yaxis={"visible": False, "range": [-0.08, 1.08], "fixedrange": True},
        margin={"l": 24, "r": 40, "t": 84, "b": 24},
    )  # fmt: skip


def _heights(axis: Axis, count: int, last: bool) -> list[float]:
    """Return the height of each run at an axis; runs of one value stand a little apart."""
    apart = 0.0 if last else 0.05
    return [
        round(axis.height(at) + apart * (0.5 - i / max(1, count - 1)), 4)
        for i, at in enumerate(axis.at)
    ]


def _scales(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return the texts beside the axes: values of the keys, and both ends of the objective."""
    notes = []
    for x, axis in enumerate(axes):
        ends = {f"{at:.4g}": at for at in (min(axis.at), max(axis.at))}
        for text, at in (ends if axis is axes[-1] else axis.ticks).items():
            notes.append({
                "text": text, "x": x, "y": round(axis.height(at), 4), "showarrow": False,
                "xanchor": "left", "xshift": 8, "font": {"size": 11, "color": MUTED},
                "bgcolor": PAPER, "opacity": 0.9, "borderpad": 1,
            })  # fmt: skip
    return notes
