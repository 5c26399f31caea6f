"""A group: runs that are equal but for the seed, their mean, their cost, their difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lora_exp.comparison.keys import ABSENT, text_of, value_of
from lora_exp.comparison.statistics import SAME, Difference, mean_and_spread
from lora_exp.files.strict import finite
from lora_exp.runs.run import SavedRun, number

ALONE = "alone"  # the place of a run that shared nothing


@dataclass(frozen=True)
class Cost:
    """What a group's runs took, as means; None: not recorded.

    Attributes:
        parameters: that train.
        peak_bytes: the most memory of any of them.
        tokens_per_s: of training.
        seconds: from start to end.
        of_pack: none of the runs trained alone, so the memory is that of whole packs, and speed and
            seconds are a job's share; else the last three are of those that did.
    """

    parameters: float | None
    peak_bytes: float | None
    tokens_per_s: float | None
    seconds: float | None
    of_pack: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that are equal but for the seed, and ended in the same way.

    Attributes:
        label: the values of the keys that differ, or a run's name.
        values: by key; a key is missing if the config has none of that name.
        runs: by seed.
        objective: the metric's name.
        goal: `minimize` or `maximize`.
        status: `finished`, `pruned`, or for each other status the number of runs.
        mean: of the objective over seeds; None: no run has a value.
        spread: its standard deviation over seeds; None: fewer than two.
        difference: of the objective to the baseline's, over seeds.
        rows: of the exact match of held-out rows to the baseline's, over rows.
        row_losses: of their loss, over rows.
        pairs: of the preference accuracy of held-out pairs, over pairs.
        cost: what the runs took.
        is_baseline: the others of its objective are held against it.
    """

    label: str
    values: Mapping[str, Any]
    runs: tuple[SavedRun, ...]
    objective: str
    goal: str
    status: str
    mean: float | None
    spread: float | None
    cost: Cost
    difference: Difference | None = None
    rows: Difference | None = None
    row_losses: Difference | None = None
    pairs: Difference | None = None
    is_baseline: bool = False

    @property
    def seeds(self) -> dict[Any, float]:
        """The objective by seed; of several runs with one seed, their mean."""
        return by_seed(self.runs)

    @property
    def verdict(self) -> str:
        """`baseline`, `better`, `worse`, `cannot be told apart`; empty: it was not compared.

        All intervals of the objective must agree: over seeds, and over rows.
        """
        if self.is_baseline:
            return "baseline"
        if self.difference is None:
            return ""
        measured = [self.difference, *([self.over_rows] if self.over_rows else [])]
        verdicts = {d.verdict for d in measured if d.interval is not None}
        return verdicts.pop() if len(verdicts) == 1 else SAME

    @property
    def over_rows(self) -> Difference | None:
        """The difference of the objective over held-out rows; None: it is not known by row."""
        several = (self.rows, self.row_losses, self.pairs)
        return next((d for d in several if d and d.measure == self.objective), None)

    @property
    def beside(self) -> Difference | None:
        """The same, unless it has a column of its own, as exact match has."""
        over_rows = self.over_rows
        return over_rows if over_rows is not self.rows else None


def group_of(runs: Sequence[SavedRun], keys: Sequence[str]) -> Group:
    """Return runs of one config, objective and kind of end as a group; keys are for its label."""
    runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))
    first = runs[0]
    values = {key: value_of(first, key) for key in keys}
    values = {key: value for key, value in values.items() if value is not ABSENT}
    mean, spread = mean_and_spread(list(by_seed(runs).values()))
    goals = [run.goal or str(run.config().get("goal") or "minimize") for run in runs]
    label = ", ".join(f"{key}={text_of(values, key)}" for key in values) or first.name
    return Group(
        label, values, tuple(runs), objective_of(first), goals[0], _status(runs), mean, spread,
        _cost(runs),
    )  # fmt: skip


def by_seed(runs: Sequence[SavedRun]) -> dict[Any, float]:
    """Return the objective by seed; of several runs with one seed, their mean."""
    values: dict[Any, list[float]] = {}
    for run in runs:
        if run.objective is not None:
            values.setdefault(run.seed, []).append(run.objective)
    return {seed: fmean(numbers) for seed, numbers in values.items()}


def objective_of(run: SavedRun) -> str:
    """Return the name of a run's objective; before it has ended, that of its config."""
    return run.judged_by or str(run.config().get("objective") or "objective")


def kind_of(run: SavedRun) -> str:
    """Return the status of a run that has a value, which groups have in common; else `other`."""
    return str(run.record["status"]) if run.objective is not None else "other"


def _status(runs: Sequence[SavedRun]) -> str:
    counts = Counter(
        "finished without a value" if run.status == "finished" and run.objective is None
        else run.status.partition(";")[0]
        for run in runs
    )  # fmt: skip
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _cost(runs: Sequence[SavedRun]) -> Cost:
    alone = [run for run in runs if run.record.get("place", ALONE) == ALONE]
    measured = alone or runs  # the memory of a pack says little of a job

    def mean(of: Sequence[SavedRun], section: str, key: str, choose: Any = fmean) -> float | None:
        sections = (run.record.get(section) for run in of)
        values = [number(s.get(key)) for s in sections if isinstance(s, Mapping)]
        known = [value for value in values if value]  # 0: the trainer has not counted
        return float(choose(known)) if known else None

    return Cost(
        mean(runs, "counts", "trainable_parameters"),
        mean(measured, "metrics", "peak_bytes", max),
        mean(measured, "metrics", "train/tokens_per_s"),
        mean(measured, "metrics", "seconds"),
        not alone,
    )


def row(group: Group, keys: Sequence[str]) -> dict[str, Any]:
    """Return a group as one flat row: the keys, then numbers; None: unknown."""
    values = {key: text_of(group.values, key) for key in keys}
    cost = asdict(group.cost)
    return {
        **(values or {"name": group.label}),
        "objective": group.objective, "goal": group.goal, "status": group.status,
        "runs": len(group.runs), "seeds": len(group.seeds),
        "mean": group.mean, "spread": group.spread, "verdict": group.verdict,
        **_flat("", group.difference), **_flat("rows_", group.rows),
        **_flat("row_losses_", group.row_losses), **_flat("pairs_", group.pairs), **cost,
        "directories": " ".join(str(run.directory) for run in group.runs),
    }  # fmt: skip


def _flat(prefix: str, difference: Difference | None) -> dict[str, Any]:
    low, high = (difference and difference.interval) or (None, None)
    return {
        f"{prefix}difference": difference and difference.mean,
        f"{prefix}low": low, f"{prefix}high": high, f"{prefix}over": difference and difference.over,
    }  # fmt: skip


def grouped(group: Group) -> dict[str, Any]:
    """Return a group and its runs as values that JSON has."""
    runs = [
        {"directory": str(run.directory), "name": run.name, "seed": run.seed,
         "status": run.status, "value": run.objective}
        for run in group.runs
    ]  # fmt: skip
    return {
        "label": group.label, "values": finite(dict(group.values)), "status": group.status,
        "mean": group.mean, "spread": group.spread, "is_baseline": group.is_baseline,
        "verdict": group.verdict, "difference": _measured(group.difference),
        "rows": _measured(group.rows), "row_losses": _measured(group.row_losses),
        "pairs": _measured(group.pairs),
        "cost": asdict(group.cost), "runs": runs,
    }  # fmt: skip


def _measured(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {**asdict(difference), "verdict": difference.verdict}
