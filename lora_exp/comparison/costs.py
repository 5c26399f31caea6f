"""Figures of groups: the objective against what it costs, with the Pareto front; each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lora_exp.comparison.points import Point, Series, caption, marks
from lora_exp.comparison.scale import LOGARITHM
from lora_exp.comparison.theme import COLOURS, MUTED, Figure, colour, figure, plain, rounded, symbol
from lora_exp.runs.run import number

COSTS = {  # title -> where run.json has it, what one of the axis's units is
    "trainable parameters": ("counts", "trainable_parameters", 1),
    "peak memory (GiB)": ("metrics", "peak_bytes", 2**30),
    "training time (s)": ("metrics", "train/seconds", 1),
}
NAMED_ON_FRONT = 8  # points of a front up to which they have their group's number
NAMED_TASKS = 24  # rows of the chart of tasks
OF_TASK = "eval/exact_match_"  # the metric of a task begins so


def front(costs: Sequence[float], values: Sequence[float], goal: str) -> list[int]:
    """Return the places of the Pareto front, by cost: no other is as cheap and as good.

    Of equal ones, the first.
    """
    sign = -1 if goal == "maximize" else 1
    order = sorted(range(len(costs)), key=lambda i: (costs[i], sign * values[i], i))
    best, places = float("inf"), []
    for i in order:
        if sign * values[i] < best:
            best = sign * values[i]
            places.append(i)
    return places


def tradeoffs(points: Sequence[Point], metric: str, goal: str) -> Figure | None:
    """Return the objective against parameters, memory and time, unless these are all equal."""
    panels = {title: _means(points, *where) for title, where in COSTS.items()}
    panels = {title: means for title, means in panels.items() if len({m.cost for m in means}) > 1}
    if not panels:
        return None
    grid = {"rows": 1, "columns": len(panels), "pattern": "independent", "xgap": 0.1}
    layout: dict[str, Any] = {"grid": grid}
    data: list[dict[str, Any]] = []
    for i, (title, means) in enumerate(panels.items()):
        suffix = str(i + 1) if i else ""
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        data += [trace | axes for trace in _panel(means, goal)]
        costs = [mean.cost for mean in means]
        is_log = min(costs) > 0 and max(costs) / min(costs) >= LOGARITHM
        layout[f"xaxis{suffix}"] = {
            "title": {"text": title}, "nticks": 6, **({"type": "log"} if is_log else {}),
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = (
            {"matches": "y", "showticklabels": False} if i else {"title": {"text": plain(metric)}}
        )
    text = (
        "A point is the mean of a group. On the dotted line no finished one is cheaper and better."
    )
    return figure("Quality and cost", caption(text, points), data, **layout, showlegend=False)


@dataclass(frozen=True)
class Mean:
    """The mean of a group: its cost, its objective as shown; `first` is one of its points."""

    first: Point
    cost: float
    value: float
    shown: float


def _means(points: Sequence[Point], section: str, key: str, unit: int) -> list[Mean]:
    """Return the means of the groups whose runs have a cost."""
    parts: dict[int, list[tuple[Point, float]]] = {}
    for point in points:
        cost = number((point.run.record.get(section) or {}).get(key))
        if cost is not None:
            parts.setdefault(point.place, []).append((point, cost / unit))
    return [
        Mean(
            part[0][0], rounded(fmean(cost for _, cost in part)),
            fmean(point.objective for point, _ in part),
            rounded(fmean(point.shown for point, _ in part)),
        )
        for part in parts.values()
    ]  # fmt: skip


def _panel(means: Sequence[Mean], goal: str) -> list[dict[str, Any]]:
    whole = [mean for mean in means if not mean.first.pruned]
    on_front = [whole[i] for i in front([m.cost for m in whole], [m.value for m in whole], goal)]
    is_named = len(on_front) <= NAMED_ON_FRONT
    line = {
        "type": "scatter", "mode": "lines", "hoverinfo": "skip",
        "x": [mean.cost for mean in on_front], "y": [mean.shown for mean in on_front],
        "line": {"shape": "hv", "dash": "dot", "width": 1.5, "color": MUTED},
    }  # fmt: skip
    points = {
        "type": "scatter", "mode": "markers+text",
        "x": [mean.cost for mean in means], "y": [mean.shown for mean in means],
        "text": [f"{m.first.place + 1}" if m in on_front and is_named else "" for m in means],
        "textposition": "top right", "textfont": {"size": 11, "color": MUTED},
        "marker": marks([mean.first for mean in means]) | {"size": 11},
        "customdata": [f"{mean.first.label}: <b>{mean.value:.4g}</b>" for mean in means],
        "meta": {"groups": [mean.first.place for mean in means]},
        "hovertemplate": "%{customdata}<br>%{x}<extra></extra>",
    }  # fmt: skip
    return [line, points]


def tasks(groups: Sequence[Series]) -> Figure | None:
    """Return the metrics of each task, a row each, a point for each group; None: no tasks."""
    rows = _task_rows(groups)
    if not rows:
        return None
    shown = dict(list(rows.items())[:NAMED_TASKS])
    data: list[dict[str, Any]] = []
    before = {
        name: value for name in shown if (value := _mean(groups, f"before/{name}")) is not None
    }
    if before:
        data.append({
            "type": "scatter", "mode": "markers", "name": "before training",
            "x": list(before.values()), "y": [plain(name) for name in before],
            "marker": {"symbol": "line-ns", "size": 18, "line": {"width": 2, "color": MUTED}},
            "hovertemplate": "before training: <b>%{x}</b><extra></extra>",
        })  # fmt: skip
    for place, group in reversed(list(enumerate(groups))):
        means = {name: _mean([group], f"eval/{name}") for name in shown}
        means = {name: value for name, value in means.items() if value is not None}
        if means:
            data.append({
                "type": "scatter", "mode": "markers", "name": group.label,
                "x": list(means.values()), "y": [plain(name) for name in means],
                "marker": {"size": 11, "color": colour(place), "symbol": symbol(place)},
                "showlegend": place < len(COLOURS), "legendrank": place + 1,
                "meta": {"group": place},
                "hovertemplate": "%{data.name}<br>%{y}: <b>%{x}</b><extra></extra>",
            })  # fmt: skip
    left_out = len(rows) - len(shown)
    caption = "Held-out answers by task; a bar is the model before training."
    caption += f" {left_out} more are in the table." if left_out else ""
    return figure(
        "Each task", caption, data, height=130 + 44 * len(shown),
        xaxis={"showgrid": True, "rangemode": "tozero", "showline": False},
        yaxis={"autorange": "reversed", "tickfont": {"size": 13}, "type": "category"},
    )  # fmt: skip


def _task_rows(groups: Sequence[Series]) -> dict[str, None]:
    """Return the names of metrics of tasks."""
    metrics = (run.record.get("metrics") or {} for group in groups for run in group.runs)
    names = dict.fromkeys(name for names in metrics for name in names)
    return {n.removeprefix("eval/"): None for n in names if n.startswith(OF_TASK)}


def _mean(groups: Sequence[Series], metric: str) -> float | None:
    values = [
        value
        for group in groups
        for run in group.runs
        if (value := number((run.record.get("metrics") or {}).get(metric))) is not None
    ]
    return rounded(fmean(values)) if values else None
