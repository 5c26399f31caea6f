"""All figures of a comparison, by name: plain values that plotly draws."""

from __future__ import annotations

from collections.abc import Sequence

from lora_exp.comparison.costs import tasks, tradeoffs
from lora_exp.comparison.curves import curves, rungs
from lora_exp.comparison.effects import by_key
from lora_exp.comparison.group import Group
from lora_exp.comparison.importance import importance
from lora_exp.comparison.layers import layers
from lora_exp.comparison.parallel import parallel
from lora_exp.comparison.points import Series, points
from lora_exp.comparison.theme import Figure, plain

STOPPED = "A cross is where a run was stopped early."


def figures(groups: Sequence[Group], objective: str, goal: str) -> dict[str, Figure]:
    """Return the figures that can be drawn, `data` and `layout` of each, by name.

    Args:
        groups: the best first.
        objective: the metric that they are compared by.
        goal: minimize or maximize.
    """
    series = [Series(plain(group.label), group.values, group.runs) for group in groups]
    all_points = points(series)
    band = "Lines are means of seeds, bands reach from the lowest seed to the highest."
    drawn = {
        "evaluation": curves(series, objective, "Evaluation", f"{band} {STOPPED}"),
        "training": curves(series, "train/loss", "Training loss", band),
        "rungs": rungs(series, objective),
        "by_key": by_key(all_points, objective),
        "importance": importance(all_points),
        "costs": tradeoffs(all_points, objective, goal),
        "parallel": parallel(all_points, objective, goal),
        "tasks": tasks(series),
        "layers": layers(series),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}
