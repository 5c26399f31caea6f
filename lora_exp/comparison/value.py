"""A comparison as a value: groups of runs, held against a baseline, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_exp.comparison.budget import fault, warnings
from lora_exp.comparison.group import Group, group_of, kind_of, objective_of, row
from lora_exp.comparison.keys import ABSENT, canonical, columns, compared, differing
from lora_exp.comparison.row_losses import over_row_losses, row_losses
from lora_exp.comparison.statistics import (
    EXACT_MATCH,
    PREFERENCE,
    matches,
    over_rows,
    over_seeds,
    preferences,
)
from lora_exp.errors import SavedError, did_you_mean
from lora_exp.runs.gather import read_runs
from lora_exp.runs.run import SavedRun


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side, held against a baseline.

    Attributes:
        runs: those compared, and damaged ones.
        keys: of the config that differ, as columns; a config group's name for its option.
        implied: keys that differ, too, but follow from `keys`.
        groups: by objective, the best first; pruned ones after finished, then the rest.
        warnings: what makes the runs unequal beside the keys, a line each.
    """

    runs: tuple[SavedRun, ...]
    keys: tuple[str, ...]
    implied: tuple[str, ...]
    groups: tuple[Group, ...]
    warnings: tuple[str, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives; values of different ones are not compared."""
        return tuple(dict.fromkeys(group.objective for group in self.groups))

    def of(self, objective: str) -> list[Group]:
        """Return the groups that are judged by an objective."""
        return [group for group in self.groups if group.objective == objective]

    def baseline(self, objective: str) -> Group | None:
        """Return the group that others of an objective are held against; None: none has a value."""
        return next((group for group in self.of(objective) if group.is_baseline), None)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for each group: its values, numbers, verdict and directories."""
        return [row(group, self.keys) for group in self.groups]

    @cached_property
    def table(self) -> Any:
        """`rows()` as a pandas DataFrame; the list itself where pandas is not installed."""
        if find_spec("pandas") is None:
            return self.rows()
        return import_module("pandas").DataFrame(self.rows())

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Figures of plotly by name; those of a second objective also have its name."""
        from plotly.graph_objects import Figure

        from lora_exp.comparison.figures import figures

        made: dict[str, Any] = {}
        for objective in self.objectives:
            groups, suffix = self.of(objective), f" {objective}" if made else ""
            drawn = figures(groups, objective, groups[0].goal)
            made |= {f"{name}{suffix}": Figure(figure) for name, figure in drawn.items()}
        return made

    def to_html(self, title: str = "runs") -> str:
        """Return the report: one page of HTML that needs no other file and no network."""
        from lora_exp.comparison.page import html

        return html(self, title)


def compare(*paths: str | Path, against: str | Path | None = None) -> Comparison:
    """Compare saved runs: those equal but for the seed are one group, held against a baseline.

    Args:
        paths: runs, sweeps, or folders of them, of any day.
        against: the baseline: a run's directory, which need not be among the paths, or its name.
            None: the best group of each objective.

    Raises:
        SavedError: a path has no run, none can be read, or the baseline is not one group.
    """
    if not paths:
        raise SavedError("name a run, a sweep, or a folder of them")
    own = [Path(against).expanduser()] if against and Path(against).expanduser().is_dir() else []
    return comparison(read_runs([*paths, *own]), against)


def comparison(runs: Sequence[SavedRun], against: str | Path | None = None) -> Comparison:
    """Compare runs that are read already; see `compare`."""
    whole = [run for run in runs if not fault(run)]
    if not whole:
        texts = [f"{run.directory}: {fault(run)}" for run in runs]
        raise SavedError("no run can be read: " + "; ".join(texts))
    differ = differing([compared(run) for run in whole])
    keys, implied = columns(whole, differ)
    groups = _sorted(_with_one_goal(_groups(whole, differ, keys)))
    groups = _held_against(groups, _baselines(groups, against))
    return Comparison(
        tuple(runs), tuple(keys), tuple(implied), tuple(groups), tuple(warnings(runs))
    )


def _groups(runs: Sequence[SavedRun], differ: Sequence[str], keys: Sequence[str]) -> list[Group]:
    """Return the groups of runs with equal configs, objectives and kinds of end."""
    parts: dict[tuple[str, ...], list[SavedRun]] = {}
    for run in runs:
        config = compared(run)
        values = (canonical(config.get(key, ABSENT)) for key in differ)
        parts.setdefault((objective_of(run), kind_of(run), *values), []).append(run)
    return [group_of(part, keys) for part in parts.values()]


def _with_one_goal(groups: Sequence[Group]) -> list[Group]:
    """Return groups with the goal that most runs of their objective have."""
    goals: dict[str, Counter[str]] = {}
    for group in groups:
        goals.setdefault(group.objective, Counter())[group.goal] += len(group.runs)
    return [replace(g, goal=goals[g.objective].most_common(1)[0][0]) for g in groups]


def _sorted(groups: list[Group]) -> list[Group]:
    """Return groups by objective, the best first; pruned ones after finished, then the rest."""
    objectives = list(dict.fromkeys(group.objective for group in groups))

    def order(group: Group) -> tuple[int, int, float]:
        kind = 2 if group.mean is None else int(group.status != "finished")
        value = group.mean or 0.0
        value = -value if group.goal == "maximize" else value
        return objectives.index(group.objective), kind, value

    return sorted(groups, key=order)


def _baselines(groups: Sequence[Group], against: str | Path | None) -> list[Group]:
    """Return the baseline of each objective that has one.

    Raises:
        SavedError: `against` is no run, several groups, or has no value.
    """
    finished = [group for group in groups if group.mean is not None and group.status == "finished"]
    best = {group.objective: group for group in reversed(finished)}
    if against is None:
        return list(best.values())
    path = Path(against).expanduser()
    below = path.resolve() if path.is_dir() else None
    named = [
        group
        for group in groups
        if any(
            run.name == str(against)
            or (below and below in (run.directory.resolve(), *run.directory.resolve().parents))
            for run in group.runs
        )
    ]
    if not named:
        near = did_you_mean(str(against), {run.name for group in groups for run in group.runs})
        raise SavedError(f"--against {against}: no run has that directory or name{near}")
    if len(named) > 1:
        raise SavedError(f"--against {against}: {len(named)} different groups; name one run's")
    if named[0] not in finished:
        text = f"it is {named[0].status}; name a run that has finished"
        raise SavedError(f"--against {against}: {text}")
    return list((best | {named[0].objective: named[0]}).values())


def _held_against(groups: Sequence[Group], baselines: Sequence[Group]) -> list[Group]:
    """Return the groups with their differences to the baseline of their objective."""
    by_objective = {group.objective: group for group in baselines}
    answered = {name: matches(group.runs) for name, group in by_objective.items()}
    losses = {name: row_losses(group.runs) for name, group in by_objective.items()}
    preferred = {name: preferences(group.runs) for name, group in by_objective.items()}
    held = []
    for group in groups:
        baseline = by_objective.get(group.objective)
        if group is baseline:
            held.append(replace(group, is_baseline=True))
        elif baseline is None or group.mean is None or group.status != "finished":
            held.append(group)
        else:
            difference = over_seeds(group.seeds, baseline.seeds, group.objective, group.goal)
            rows = over_rows(matches(group.runs), answered[group.objective], EXACT_MATCH)
            by_row = over_row_losses(row_losses(group.runs), losses[group.objective])
            pairs = over_rows(preferences(group.runs), preferred[group.objective], PREFERENCE)
            held.append(
                replace(group, difference=difference, rows=rows, row_losses=by_row, pairs=pairs)
            )
    return held
