"""The tables of the report: groups, differences of their configs, stopped jobs, runs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from lora_exp.comparison.group import Group
from lora_exp.comparison.keys import compared, differing, text_of
from lora_exp.comparison.statistics import Difference
from lora_exp.comparison.theme import COLOURS
from lora_exp.record.console import short, size
from lora_exp.runs.run import LOADER, OVERRIDES, SavedRun, number

Table = dict[str, Any]  # caption, columns (name, numeric), rows (best, cells)
Badge = dict[str, Any]  # of a group: its number, its class of colour, and its place among all


def badges(groups: Sequence[Group], first: int) -> list[Badge]:
    """Return the badges of one objective's groups; `first` is the place of the first among all."""
    return [
        {
            "number": i + 1, "place": first + i, "label": group.label,
            "colour": f"c{i}" if i < len(COLOURS) else "cx",
        }
        for i, group in enumerate(groups)
    ]  # fmt: skip


def cell(text: object, value: Any = None, style: str = "") -> dict[str, Any]:
    """Return a cell: its text, what it is sorted by and a CSV gets, its class."""
    text = "" if text is None else text
    return {"text": text, "value": value, "class": style, "badge": None, "note": None}


def numeric(value: float | None, text: str | None = None) -> dict[str, Any]:
    """Return the cell of a number; a dash if there is none."""
    if value is None:
        return cell("-", "", "number")
    return cell(text or short(value), f"{value:.10g}", "number")


def badged(badge: Badge) -> dict[str, Any]:
    """Return the cell of a group's number."""
    return cell(badge["number"], badge["number"]) | {"badge": badge}


def table(caption: str, names: dict[str, bool], rows: list[dict[str, Any]]) -> Table:
    """Return a table; `names` says of each column whether it is numeric."""
    columns = [{"name": name, "numeric": is_numeric} for name, is_numeric in names.items()]
    return {"caption": caption, "columns": columns, "rows": rows}


def group_table(groups: Sequence[Group], keys: Sequence[str], marks: Sequence[Badge]) -> Table:
    """Return a row for each group: its values, its objective, its difference, what it cost."""
    has_rows = any(group.rows for group in groups)
    all_finished = all(group.status == "finished" for group in groups)
    objective = groups[0].objective
    names = {
        "group": False, **dict.fromkeys(keys or ["name"], False), objective: True, "seeds": True,
        "difference": True, "verdict": False, **({"exact match": True} if has_rows else {}),
        "parameters": True, "memory": True, "tokens/s": True, "seconds": True,
        **({} if all_finished else {"status": False}),
    }  # fmt: skip
    rows = []
    for group, badge in zip(groups, marks, strict=True):
        values = [cell(text_of(group.values, key)) for key in keys] or [cell(group.label)]
        spread = f"± {group.spread:.2g}" if group.spread is not None else None
        cells = [
            badged(badge), *values, numeric(group.mean) | {"note": spread},
            numeric(len(group.seeds)), _differences(group),
            cell(group.verdict or "-", None, f"verdict {group.verdict.partition(' ')[0]}"),
            *([_difference(group.rows)] if has_rows else []),
            *_costs(group), *([] if all_finished else [cell(group.status, None, "status")]),
        ]  # fmt: skip
        rows.append({"best": group.is_baseline, "cells": cells})
    return table(f"Groups by {objective}, the best first", names, rows)


def _differences(group: Group) -> dict[str, Any]:
    """Return the cell of a difference over seeds, with its interval over rows."""
    made, rows = _difference(group.difference), group.beside
    if not rows or not rows.interval:
        return made
    low, high = rows.interval
    return made | {"note": f"{made['note']}\n[{low:+.3g}, {high:+.3g}] {rows.over}"}


def _difference(difference: Difference | None) -> dict[str, Any]:
    """Return a cell with a difference, and its interval or why it has none."""
    if difference is None:
        return numeric(None)
    made = numeric(difference.mean, f"{difference.mean:+.3g}")
    if difference.interval is None:
        return made | {"note": difference.over}
    low, high = difference.interval
    return made | {"note": f"[{low:+.3g}, {high:+.3g}]"}


def _costs(group: Group) -> list[dict[str, Any]]:
    """Return cells of what a group took; `~`: the memory of a whole pack."""
    cost, mark = group.cost, "~" if group.cost.of_pack else ""
    peak = f"{mark}{size(int(cost.peak_bytes))}" if cost.peak_bytes is not None else None
    rates = (cost.tokens_per_s, cost.seconds)
    return [
        numeric(cost.parameters, f"{cost.parameters:,.0f}" if cost.parameters else None),
        numeric(cost.peak_bytes, peak),
        *(numeric(n, short(n) if n is not None else None) for n in rates),
    ]


def differences(groups: Sequence[Group]) -> Table:
    """Return each key of the config that is not the same in all groups."""
    configs = [compared(group.runs[0]) for group in groups]
    rows = []
    for key in differing(configs):
        texts = [text_of(config, key) for config in configs]
        usual = Counter(texts).most_common(1)[0][0]
        cells = [cell(text or "-", text, "same" if text == usual else "") for text in texts]
        rows.append({"best": False, "cells": [cell(key), *cells]})
    names = ["key", *(str(i + 1) for i in range(len(groups)))]
    return table("Keys of the config that differ", dict.fromkeys(names, False), rows)


def stops(groups: Sequence[Group], marks: Sequence[Badge]) -> Table:
    """Return the runs that ended before their last step, and why."""
    rows = []
    for group, badge in zip(groups, marks, strict=True):
        for run in group.runs:
            if stopped := run.record.get("stopped"):
                cells = [
                    badged(badge), cell(run.name), cell(stopped.get("rule")),
                    numeric(number(stopped.get("step"))), numeric(number(stopped.get("value"))),
                    cell(stopped.get("reason")),
                ]  # fmt: skip
                rows.append({"best": False, "cells": cells})
    names = {"group": False, "run": False, "rule": False, "step": True, "value": True, "why": False}
    return table("Runs that were stopped early", names, rows)


def plan_text(runs: Sequence[SavedRun]) -> str:
    """Return how much of the planned steps was trained, where runs were stopped."""
    steps = [number(run.record.get("steps")) or 0 for run in runs]
    reports = [report for run in runs for report in run.record.get("rungs") or []]
    planned = max([*steps, *(number(report.get("steps")) or 0 for report in reports)], default=0)
    stopped = [run.record["stopped"] for run in runs if run.record.get("stopped")]
    rules = ", ".join(sorted({str(stop.get("rule")) for stop in stopped}))
    share = sum(steps) / (planned * len(runs)) if planned else 0
    return (
        f"{len(stopped)} of {len(runs)} runs were stopped by {rules}; together all runs trained"
        f" {share:.0%} of the steps that {len(runs)} whole ones take."
    )


def run_table(groups: Sequence[Group], marks: Sequence[Badge]) -> Table:
    """Return a row for each run."""
    rows = []
    for group, badge in zip(groups, marks, strict=True):
        for run in group.runs:
            digest = str(run.record.get("fingerprint") or "")
            cells = [
                badged(badge), cell(run.name), numeric(number(run.seed)), cell(group.objective),
                numeric(run.objective), numeric(number(run.record.get("steps"))),
                cell(run.status, None, "status"), cell(digest[:12], digest, "hash"),
            ]  # fmt: skip
            rows.append({"best": False, "cells": cells})
    names = {
        "group": False, "run": False, "seed": True, "objective": False, "value": True,
        "steps": True, "status": False, "fingerprint": False,
    }  # fmt: skip
    return table("All runs", names, rows)


def details(groups: Sequence[Group], marks: Sequence[Badge]) -> list[dict[str, Any]]:
    """Return for each run the command that repeats it, and the hashes of what went in."""
    entries = []
    for group, badge in zip(groups, marks, strict=True):
        for run in group.runs:
            record = run.record
            versions = (f"{k} {v}" for k, v in (record.get("versions") or {}).items())
            facts = [
                ("fingerprint", record.get("fingerprint")),
                ("base", record.get("base")),
                *(record.get("data") or {}).items(),
                *(record.get("adapters") or {}).items(),
                ("versions", ", ".join(versions)),
                ("trained", record.get("place")),
                ("error", record.get("error")),
            ]
            entries.append({
                "badge": badge, "name": run.name, "status": run.status, "command": command(run),
                "facts": [(name, value) for name, value in facts if value],
            })  # fmt: skip
    return entries


def command(run: SavedRun) -> str:
    """Return the command that trains a run again, alone."""
    path = run.directory / OVERRIDES
    try:
        saved = yaml.load(path.read_text(encoding="utf-8", errors="replace"), Loader=LOADER)
    except (OSError, yaml.YAMLError):
        saved = None
    overrides = map(str, saved) if isinstance(saved, list) else ()
    return " ".join(["lora-exp run", *map(shlex.quote, overrides)])
