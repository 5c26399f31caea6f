"""The jobs of a sweep in order, the best first, and their table.

Only jobs that are judged alike are compared: others are groups of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.files.paths import is_scratch

if TYPE_CHECKING:
    from rich.table import Table


def judgement(row: dict[str, Any]) -> str:
    """Return what a job is judged by, empty if it has no objective yet.

    Each algorithm has a loss of its own; other metrics mean the same for all.
    """
    name = row["judged_by"] or ""
    algorithm = row.get("algorithm")  # earlier versions wrote none
    return f"{name} of {algorithm}" if name.endswith("loss") and algorithm else name


def judgements(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return what the jobs with an objective are judged by, each once."""
    return list(dict.fromkeys(judgement(r) for r in rows if r["objective"] is not None))


def sort_key(row: dict[str, Any]) -> tuple[bool, str, float, float]:
    """Return the key that sorts the best row of each judgement first.

    Pruned jobs stand after the others, the later first, and jobs without an objective at the end.
    """
    if row["objective"] is None:
        return True, "", math.inf, math.inf
    value = float(row["objective"])
    is_pruned = row.get("status") == "pruned"  # earlier versions wrote no `stopped`
    pruned_at = (row.get("stopped") or {}).get("step", 0) if is_pruned else math.inf
    return False, judgement(row), -pruned_at, -value if row["goal"] == "maximize" else value


def varied_keys(rows: list[dict[str, Any]]) -> list[str]:
    """Return the overridden keys that are not the same in all jobs."""
    keys = dict.fromkeys(key for r in rows for key in r["overrides"])
    return [key for key in keys if len({r["overrides"].get(key) for r in rows}) > 1]


def sweep_table(folder: Path, rows: list[dict[str, Any]]) -> Table:
    """Return the table of a sweep's jobs, the best first, a section for each judgement."""
    from rich.table import Table

    varying, judged = varied_keys(rows), judgements(rows)
    names = {r["judged_by"] for r in rows if r["judged_by"]}
    objective = names.pop() if len(names) == 1 else "objective"
    shown_metrics = {"seconds": "seconds"}
    if any("eval/exact_match" in r["metrics"] for r in rows):
        shown_metrics = {"eval/exact_match": "exact match", **shown_metrics}
    texts = ["judged by"] if len(judged) > 1 else []
    columns = ["job", *(varying or ["name"]), *texts, objective, *shown_metrics.values(), "status"]
    title = None if is_scratch(folder) else str(folder)
    table = Table(title=title, title_justify="left", caption=_caption(rows), caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for r, following in pairwise([*rows, None]):
        assert r is not None
        ends_group = following is not None and sort_key(r)[:2] != sort_key(following)[:2]
        cells = _cells(r, varying, bool(texts), list(shown_metrics))
        table.add_row(*cells, end_section=ends_group and bool(texts))
    return table


def _cells(row: dict[str, Any], varying: list[str], judged: bool, metrics: list[str]) -> list[Any]:
    from rich.text import Text

    from lora_exp.record.console import short

    values = [row["overrides"].get(key, "") for key in varying] or [row["name"]]
    values += [judgement(row)] if judged else []
    numbers = [row["objective"], *(row["metrics"].get(key) for key in metrics)]
    number_texts = [short(n) if n is not None else "-" for n in numbers]
    stopped = f": {row['stopped']['reason']}" if row.get("stopped") else ""
    status = row["status"] + stopped + ("" if row["proven"] else ", not proven equal")
    return [row["job"], *(Text(value) for value in values), *number_texts, Text(status)]


def _caption(rows: list[dict[str, Any]]) -> str | None:
    """Return what the numbers do not say: which are compared, and whose the seconds are."""
    lines, judged = [], judgements(rows)
    if len(judged) > 1:
        lines.append(f"not compared with each other: jobs judged by {', '.join(judged)}")
    if any(str(r.get("place")).startswith("lockstep") for r in rows):
        text = "a job's own share, the first with what all share; they add up to the pack's"
        lines.append(f"seconds in lockstep: {text}")
    return "\n".join(lines) or None
