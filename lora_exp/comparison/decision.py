"""What a comparison says, in sentences: the best group, and whether the next is told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from lora_exp.comparison.group import Group
from lora_exp.comparison.statistics import SAME
from lora_exp.record.console import short, size
from lora_exp.runs.run import SavedRun, number

Tile = tuple[str, str, str]  # name, value, note


class Compared(Protocol):
    """What a report reads of a comparison; see `value.Comparison`."""

    @property
    def runs(self) -> tuple[SavedRun, ...]: ...  # noqa: D102
    @property
    def keys(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def groups(self) -> tuple[Group, ...]: ...  # noqa: D102
    @property
    def warnings(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def objectives(self) -> tuple[str, ...]: ...  # noqa: D102
    def of(self, objective: str) -> list[Group]: ...  # noqa: D102
    def baseline(self, objective: str) -> Group | None: ...  # noqa: D102


def decision(compared: Compared, objective: str) -> tuple[str, list[str]]:
    """Return the decision about one objective in a sentence, and the sentences that support it."""
    groups = compared.of(objective)
    finished = [group for group in groups if group.mean is not None and group.status == "finished"]
    if not finished:
        return f"No run has finished with a value of {objective} yet.", []
    best, others = finished[0], finished[1:]
    extreme = "highest" if best.goal == "maximize" else "lowest"
    if not others:
        only = "the only group that has finished" if len(groups) > 1 else "the only group"
        return f"{objective} is {_value(best)} with {best.label}, {only}.", []
    held = [group for group in others if group.difference is not None]
    head = f"{best.label} has the {extreme} {objective}, {_value(best)}"
    if not best.is_baseline:  # another was asked for
        baseline = compared.baseline(objective)
        assert baseline is not None
        text = f"Against the baseline, {baseline.label}: {_difference(best)}."
        return f"{head}; against the baseline it is {_judged(best.verdict)}.", [text]
    apart = [group for group in held if group.verdict == "worse"]
    if not apart:
        return f"{head}, but no other group can be told apart from it.", _support(held)
    if len(apart) == len(others):
        return f"{head}, and every other group is worse.", _support(held)
    count = len(others) - len(apart)
    return (
        f"{head}; {count} other{'s' * (count > 1)} cannot be told apart from it.",
        _support(held),
    )


def _support(held: Sequence[Group]) -> list[str]:
    """Return how the next group differs, and what would tell more."""
    if not held:
        return []
    lines = [f"The next, {held[0].label}: {_difference(held[0])}."]
    if all(group.difference and group.difference.over == "one seed" for group in held):
        lines.append("One seed each: seed=1,2,3 would tell a difference from chance.")
    return lines


def _judged(verdict: str) -> str:
    return "not told apart" if verdict in (SAME, "") else verdict


def _difference(group: Group) -> str:
    """Return how a group differs: over seeds, or if that has no interval over held-out rows."""
    difference = group.difference
    if difference is None:
        return "not compared"
    if difference.interval is None and group.over_rows and group.over_rows.interval:
        difference = group.over_rows
    text = f"{difference.mean:+.3g}"
    if difference.interval is None:
        return f"{text} ({difference.over}, so no interval)"
    low, high = difference.interval
    interval = f"95% interval {low:+.3g} to {high:+.3g} over {difference.over}"
    return f"{text} ({interval}), {_judged(difference.verdict)}"


def _value(group: Group) -> str:
    assert group.mean is not None
    return short(group.mean) + (f" ± {group.spread:.2g}" if group.spread is not None else "")


def tiles(compared: Compared) -> list[Tile]:
    """Return the numbers that stand above all tables."""
    counts = Counter(run.status.partition(";")[0] for run in compared.runs)
    ordered = sorted(counts, key=lambda status: (status != "finished", -counts[status], status))
    states = ", ".join(f"{counts[status]} {status}" for status in ordered)
    seeds = {run.seed for run in compared.runs if run.seed is not None}
    numbers: list[Tile] = [
        ("runs", f"{len(compared.runs)}", states),
        ("groups", f"{len(compared.groups)}", f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"),
    ]
    best = compared.baseline(compared.objectives[0])
    if best is None or best.mean is None:
        return numbers
    record = best.runs[0].record
    before = number(record["metrics"].get(f"before/{best.objective.partition('/')[2]}"))
    note = f"{short(before)} before training" if before is not None else ""
    numbers.append((best.objective, _value(best), note))
    total = number((record.get("counts") or {}).get("parameters"))
    if best.cost.parameters is not None:
        share = f"{best.cost.parameters / total:.1%} of {total:,.0f}" if total else ""
        numbers.append(("its trained parameters", f"{best.cost.parameters:,.0f}", share))
    if best.cost.peak_bytes is not None:
        pack = "of its whole pack" if best.cost.of_pack else ""
        numbers.append(("its peak memory", size(int(best.cost.peak_bytes)), pack))
    return numbers
