"""How much of the objective each key explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.comparison.keys import ABSENT, canonical
from lora_exp.comparison.points import Point
from lora_exp.comparison.theme import COLOURS, TEXT, Figure, figure, plain, rounded
from lora_exp.runs.run import number

FEW_RUNS = 16  # below, an importance is a guess


def explained(values: Sequence[Any], objectives: Sequence[float]) -> float:
    """Return the share of the objective's variance that a key explains, 0 to 1.

    It is epsilon squared of a one-way analysis of variance (Kelley 1935: eta squared, adjusted for
    the number of levels). Of a number with more levels than half the runs it is the square of
    Spearman's rank correlation, for then groups of equal values explain nothing.
    """
    count, levels = len(values), {canonical(value) for value in values}
    if len(levels) < 2 or len(set(objectives)) < 2:
        return 0.0
    numbers = [number(value) for value in values]
    if len(levels) > count / 2 and None not in numbers:
        return correlation(ranks(numbers), ranks(objectives)) ** 2  # type: ignore[arg-type]
    if len(levels) >= count:
        return 0.0
    parts: dict[str, list[float]] = {}
    for value, objective in zip(values, objectives, strict=True):
        parts.setdefault(canonical(value), []).append(objective)
    within = sum(_squares(part) for part in parts.values()) / (count - len(levels))
    return max(0.0, 1 - within / (_squares(objectives) / (count - 1)))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value; equal ones share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 if one side is constant."""
    left_mean, right_mean = sum(left) / len(left), sum(right) / len(right)
    product = sum((a - left_mean) * (b - right_mean) for a, b in zip(left, right, strict=True))
    scale = (_squares(left) * _squares(right)) ** 0.5
    return float(product / scale) if scale else 0.0


def importances(points: Sequence[Point]) -> dict[str, float]:
    """Return the share of variance that each key explains, the largest first."""
    keys = dict.fromkeys(key for point in points for key in point.values)
    objectives = [point.objective for point in points]
    shares = {
        key: explained([point.values.get(key, ABSENT) for point in points], objectives)
        for key in keys
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def importance(points: Sequence[Point]) -> Figure | None:
    """Return the keys by the share of the objective's variance that they explain."""
    shares = importances(points)
    if len(points) < 3 or len(shares) < 2:
        return None
    caption = "Share of the variance of the objective that each key explains by itself."
    if len(points) < FEW_RUNS:
        caption += f" With {len(points)} runs this is a hint at most: below {FEW_RUNS} it is noise."
    names = [plain(key) for key in shares]
    trace = {
        "type": "bar", "orientation": "h", "y": names, "x": [rounded(s) for s in shares.values()],
        "text": [f"{share:.0%}" for share in shares.values()], "textposition": "outside",
        "marker": {"color": COLOURS[0]}, "cliponaxis": False,
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }  # fmt: skip
    return figure(
        "Importance of the keys", caption, [trace], height=110 + 38 * len(names), bargap=0.4,
        showlegend=False,
        yaxis={"autorange": "reversed", "tickfont": {"color": TEXT}, "ticksuffix": "  "},
        xaxis={"range": [0, 1], "tickformat": ".0%", "showgrid": True, "showline": False},
        margin={"l": 56, "r": 48, "t": 48, "b": 40},
    )  # fmt: skip


def _squares(values: Sequence[float]) -> float:
    """Return the sum of squared differences to the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
