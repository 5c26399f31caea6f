"""Figures over steps: the objective, the training loss, the rungs where jobs were compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.comparison.points import Series
from lora_exp.comparison.theme import (
    COLOURS,
    FILL,
    MUTED,
    PAPER,
    Figure,
    colour,
    figure,
    plain,
    rounded,
    symbol,
    translucent,
)
from lora_exp.runs.run import SavedRun, number

MOST, SQUEEZED = 0.8, 3  # this share is shown if all need so many times the room
FEW = 60  # points of a curve and its band up to which each is marked
POINTS = 240  # of a curve; more cannot be seen, and would make the page heavy
Curve = tuple[list[int], list[float]]  # steps and values


def curve(run: SavedRun, metric: str) -> Curve:
    """Return the steps at which a run logged a metric, and its values; the last of a step counts.

    Neighbours are averaged if there are more than can be seen.
    """
    values: dict[int, float] = {}
    for line in run.history():
        value, step = number(line.get(metric)), line.get("step")
        if value is not None and isinstance(step, int):
            values[step] = value
    steps = sorted(values)
    size = -(-len(steps) // POINTS)
    if size > 1:  # step 0 stays alone: it is the model before training
        first = 1 if steps[0] == 0 else 0
        parts = [steps[i : i + size] for i in range(first, len(steps), size)]
        means = {part[-1]: sum(values[s] for s in part) / len(part) for part in parts}
        values = {step: values[step] for step in steps[:first]} | means
        steps = list(values)
    return steps, [rounded(values[step]) for step in steps]


def curves(groups: Sequence[Series], metric: str, title: str, caption: str) -> Figure | None:
    """Return a metric over the steps, a line for each group: the mean of its seeds, in their band.

    None: no run has logged it twice. Seeds that ended at different steps are lines of their own,
    for a mean of fewer seeds would jump where one ends.
    """
    data: list[dict[str, Any]] = []
    seen: list[float] = []
    before: list[float] = []
    last: list[float] = []
    ends: list[tuple[int, SavedRun, int, float]] = []
    for place, group in reversed(list(enumerate(groups))):  # the best on top
        lines = [(run, line) for run in group.runs if (line := curve(run, metric))[0]]
        data += _lines(place, group, lines)
        for run, (steps, values) in lines:
            trained = [value for step, value in zip(steps, values, strict=True) if step > 0]
            seen += trained
            before += values[:1] if steps[0] == 0 else []
            last += trained[-1:] if run.record.get("status") == "finished" else []
            if run.record.get("status") == "pruned" and trained:
                ends.append((place, run, steps[-1], values[-1]))
    if len({step for trace in data for step in trace["x"]}) < 2 or not seen:
        return None
    if max(len(trace["x"]) for trace in data) > FEW:
        for trace in data:
            trace["mode"] = "lines"
    low, high = _range(seen, last)
    notes = []
    if before and not low <= before[0] <= high:
        text = f"before training: {before[0]:.4g}"
        notes = [_note(text)]
    if max(seen) > high or min(seen) < low:
        caption += " Some is out of the picture: a double click shows all."
    if ends:
        data.append(_ends(ends))
    return figure(
        title, caption, data, annotations=notes,
        xaxis={"title": {"text": "step"}, "rangemode": "tozero"},
        yaxis={"title": {"text": plain(metric)}, "range": [low, high]},
    )  # fmt: skip


def _lines(place: int, group: Series, lines: list[tuple[SavedRun, Curve]]) -> list[dict[str, Any]]:
    """Return the traces of a group: a band and a mean, or a line for each seed."""
    if not lines:
        return []
    steps = lines[0][1][0]
    if len(lines) == 1 or any(line[0] != steps for _, line in lines):
        return [
            _line(place, group, steps, values, f"{group.label}, {plain(_seed(run))}", i == 0)
            for i, (run, (steps, values)) in enumerate(lines)
        ]
    columns = list(zip(*(values for _, (_, values) in lines), strict=True))
    mean = [rounded(sum(column) / len(column)) for column in columns]
    band = {
        "type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself",
        "fillcolor": translucent(colour(place), FILL), "hoverinfo": "skip", "showlegend": False,
        "x": [*steps, *reversed(steps)],
        "y": [*map(max, columns), *reversed([*map(min, columns)])],
        "meta": {"group": place},
    }  # fmt: skip
    name = f"{group.label}, mean of {len(lines)} seeds"
    return [band, _line(place, group, steps, mean, name, True)]


def _line(
    place: int, group: Series, steps: list[int], values: list[float], name: str, legend: bool
) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "x": steps, "y": values,
        "line": {"color": colour(place), "width": 2.2 if place < len(COLOURS) else 1},
        "marker": {"size": 6, "symbol": symbol(place)},
        "name": group.label, "legendgroup": str(place), "legendrank": place + 1,
        "showlegend": legend and place < len(COLOURS),
        "meta": {"group": place, "name": name},
        "hovertemplate": "%{meta.name}<br>step %{x}: <b>%{y}</b><extra></extra>",
    }  # fmt: skip


def _ends(ends: list[tuple[int, SavedRun, int, float]]) -> dict[str, Any]:
    """Return the points where pruned runs ended."""
    reasons = [(run.record.get("stopped") or {}).get("reason", "") for _, run, _, _ in ends]
    pairs = zip(ends, reasons, strict=True)
    texts = [f"{plain(run.name)}: {plain(why)}" for (_, run, _, _), why in pairs]
    return {
        "type": "scatter", "mode": "markers", "name": "stopped early", "showlegend": True,
        "x": [end[2] for end in ends], "y": [end[3] for end in ends],
        "text": texts,
        "marker": {
            "symbol": "x-thin", "size": 8,
            "line": {"width": 2, "color": [colour(end[0]) for end in ends]},
        },
        "meta": {"groups": [end[0] for end in ends]},
        "hovertemplate": "stopped early: %{text}<extra></extra>",
    }  # fmt: skip


def _range(values: list[float], last: list[float]) -> tuple[float, float]:
    """Return the range to show: all values, or most where the others would squeeze these.

    Args:
        values: of all curves.
        last: of each finished run, which are always shown.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    far = [ordered[int(share * (len(ordered) - 1))] for share in (1 - MOST, MOST)]
    least, most = min([far[0], *last]), max([far[1], *last])
    if high - low > SQUEEZED * (most - low) > 0:
        high = most
    elif high - low > SQUEEZED * (high - least) > 0:  # of a metric that rises
        low = least
    space = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return rounded(low - space), rounded(high + space)


def _note(text: str) -> dict[str, Any]:
    return {
        "text": text, "xref": "paper", "yref": "paper", "x": 0, "y": 1, "showarrow": False,
        "xanchor": "left", "yanchor": "bottom", "font": {"size": 12, "color": MUTED},
    }  # fmt: skip


def _seed(run: SavedRun) -> str:
    return f"seed {run.seed}" if run.seed is not None else run.name


def rungs(groups: Sequence[Series], metric: str) -> Figure | None:
    """Return what jobs reported at the rungs where they were compared; None: there are none."""
    data = []
    steps: dict[int, int] = {}
    for place, group in reversed(list(enumerate(groups))):
        for run in group.runs:
            reports = [
                r for r in run.record.get("rungs") or [] if number(r.get("value")) is not None
            ]
            steps |= {int(r["rung"]): int(r["step"]) for r in reports}
            if reports:
                data.append(_ladder(place, run, reports))
    if not data:
        return None
    ticks = sorted(steps)
    return figure(
        "Rungs",
        "What each job reported when it was compared with the others; "
        "a hollow point is where it was stopped.",
        data,
        xaxis={"tickvals": ticks, "ticktext": [f"step {steps[rung]}" for rung in ticks],
               "range": [-0.3, max(ticks) + 0.3]},
        yaxis={"title": {"text": plain(metric)}},
    )  # fmt: skip


def _ladder(place: int, run: SavedRun, reports: list[dict[str, Any]]) -> dict[str, Any]:
    stopped = run.record.get("status") == "pruned"
    fills = [colour(place)] * (len(reports) - stopped) + [PAPER] * stopped
    return {
        "type": "scatter", "mode": "lines+markers", "name": plain(run.name), "showlegend": False,
        "x": [r["rung"] for r in reports], "y": [rounded(r["value"]) for r in reports],
        "text": [f"{r.get('rank')} of {r.get('of')}" for r in reports],
        "line": {"color": colour(place), "width": 1.4},
        "marker": {"size": 9, "color": fills, "line": {"color": colour(place), "width": 2}},
        "meta": {"group": place, "name": plain(run.name)},
        "hovertemplate": "%{meta.name}<br>%{text}: <b>%{y}</b><extra></extra>",
    }  # fmt: skip
