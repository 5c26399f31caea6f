"""Where each layer of the base changed: the norm of the adapter's update."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lora_exp.comparison.points import Series
from lora_exp.comparison.theme import COLOURS, Figure, colour, figure, rounded, symbol

NUMBER = re.compile(r"\.(\d+)\.")  # of the layer, in a module's name


def layers(groups: Sequence[Series]) -> Figure | None:
    """Return the norm of all updates in a layer by the layer's number; None: none are recorded.

    A group's line is the mean over its runs that have norms.
    """
    data = [
        _line(place, group, norms)
        for place, group in reversed(list(enumerate(groups)))
        if (norms := _means([by_layer(run.updates()) for run in group.runs]))
    ]
    if not data:
        return None
    text = "The Frobenius norm of the update to all adapted modules of a layer, as in inspect."
    return figure(
        "Where layers changed", text, data,
        xaxis={"title": {"text": "layer"}, "dtick": 1 if _longest(data) <= 16 else None},
        yaxis={"title": {"text": "norm of the update"}, "rangemode": "tozero"},
    )  # fmt: skip


def by_layer(updates: Mapping[str, float]) -> dict[int, float]:
    """Return the root of the sum of squared norms of each layer's modules, by layer number."""
    squares: defaultdict[int, float] = defaultdict(float)
    for name, norm in updates.items():
        if number := NUMBER.search(f".{name}."):
            squares[int(number[1])] += norm**2
    return {layer: math.sqrt(squares[layer]) for layer in sorted(squares)}


def _means(runs: Sequence[Mapping[int, float]]) -> dict[int, float]:
    known = [norms for norms in runs if norms]
    numbers = sorted({layer for norms in known for layer in norms})
    return {n: rounded(fmean(norms.get(n, 0.0) for norms in known)) for n in numbers}


def _line(place: int, group: Series, norms: Mapping[int, float]) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "x": list(norms), "y": list(norms.values()),
        "line": {"color": colour(place), "width": 2.2 if place < len(COLOURS) else 1},
        "marker": {"size": 6, "symbol": symbol(place)},
        "name": group.label, "legendrank": place + 1, "showlegend": place < len(COLOURS),
        "meta": {"group": place},
        "hovertemplate": "%{data.name}<br>layer %{x}: <b>%{y}</b><extra></extra>",
    }  # fmt: skip


def _longest(data: Sequence[Mapping[str, Any]]) -> int:
    return max(len(line["x"]) for line in data)
