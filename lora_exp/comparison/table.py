"""A comparison as tables: for the terminal, as rows of a CSV file, as JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.comparison.group import Group, grouped
from lora_exp.comparison.keys import text_of
from lora_exp.comparison.statistics import APART, Difference
from lora_exp.comparison.value import Comparison
from lora_exp.files.whole import write_whole
from lora_exp.record.console import short, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

KEYS_SHOWN = 6  # on the terminal; files have all
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def page(comparison: Comparison) -> RenderableType:
    """Return the comparison for the terminal: warnings first, then a table for each objective."""
    from rich.console import Group as Lines
    from rich.text import Text

    lines: list[RenderableType] = [Text(_clean(w), "yellow") for w in comparison.warnings]
    lines += [_table(comparison, objective) for objective in comparison.objectives]
    return Lines(*lines, *(Text(_clean(note), "dim") for note in notes(comparison)))


def notes(comparison: Comparison) -> list[str]:
    """Return what the tables leave out, and what would tell more."""
    lines = []
    if more := comparison.keys[KEYS_SHOWN:]:
        lines.append(f"also varied, in --csv and --json: {', '.join(more)}")
    if comparison.implied:
        lines.append(f"follow from the columns: {', '.join(comparison.implied)}")
    if any(group.cost.of_pack for group in comparison.groups):
        text = "~ is the memory of a pack, seconds in packs are a job's share"
        lines.append(f"{text}; a run of the group, trained alone, replaces both")
    lines += _notes_on_differences(comparison.groups)
    return lines


def _notes_on_differences(groups: Sequence[Group]) -> list[str]:
    differences = [group.difference for group in groups if group.difference]
    if not differences:
        return []
    lines = []
    if all(d.over == "one seed" for d in differences):
        of_rows = any(group.over_rows for group in groups)
        text = "one seed each: seed=1,2,3 tells a difference from chance in training"
        lines.append(text + ("; over rows a verdict is about these runs" if of_rows else ""))
    if any(d.over == APART for d in differences):
        lines.append("seeds are compared in pairs: without two in common there is no interval")
    text = "[low, high] is a 95% interval of the difference to the baseline, over seeds"
    beside = [group.beside for group in groups]
    over_rows = ["below it"] if any(rows and rows.interval for rows in beside) else []
    over_rows += ["of exact match"] if any(group.rows for group in groups) else []
    lines.append(text + (f"; {' and '.join(over_rows)}, over held-out rows" if over_rows else ""))
    return lines


def _table(comparison: Comparison, objective: str) -> Table:
    """Return the table of one objective's groups, the best first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    groups, keys = comparison.of(objective), comparison.keys[:KEYS_SHOWN]
    has_rows = any(group.rows for group in groups)
    all_finished = all(group.status == "finished" for group in groups)
    names = ["name"] if not keys else [*keys]
    names += [objective, "seeds", "difference", "verdict"]
    names += ["exact match difference"] if has_rows else []
    names += ["parameters", "memory", "tokens/s", "seconds"]
    names += [] if all_finished else ["status"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(_cell(name), overflow="fold")
    for group in groups:
        values = [text_of(group.values, key) for key in keys] or [group.label]
        values += [_value(group), str(len(group.seeds))]
        texts = [group.verdict or "-", *([_difference(group.rows)] if has_rows else [])]
        texts += [*_costs(group), *([] if all_finished else [group.status])]
        cells = [*map(_cell, values), _cell(*_differences(group)), *map(_cell, texts)]
        table.add_row(*cells, style="bold" if group.is_baseline else "")
    return table


def _value(group: Group) -> str:
    if group.mean is None:
        return "-"
    return short(group.mean) + (f" ± {group.spread:.2g}" if group.spread is not None else "")


def _differences(group: Group) -> list[str]:
    """Return the difference over seeds, and its interval over rows, as lines."""
    lines = [_difference(group.difference)]
    if (rows := group.beside) and rows.interval:
        lines.append(f"{_interval(rows.interval)} {rows.over}")
    return lines


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    mean = _signed(difference.mean)
    if difference.interval is None:
        return f"{mean} ({difference.over})"
    return f"{mean} {_interval(difference.interval)}"


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"[{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.2g}"


def _costs(group: Group) -> list[str]:
    cost, mark = group.cost, "~" if group.cost.of_pack else ""
    peak = None if cost.peak_bytes is None else size(int(cost.peak_bytes))
    measured = [peak, *(None if n is None else short(n) for n in (cost.tokens_per_s, cost.seconds))]
    parameters = "-" if cost.parameters is None else f"{cost.parameters:,.0f}"
    marks = (mark, "", "")
    texts = ("-" if t is None else m + t for m, t in zip(marks, measured, strict=True))
    return [parameters, *texts]


def _cell(*lines: str) -> Text:
    from rich.text import Text

    return Text("\n".join(map(_clean, lines)))


def _clean(text: str) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return CONTROL.sub(" ", text)


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write `comparison.rows()` as a CSV file.

    Raises:
        OSError: it cannot be written.
    """
    rows, text = comparison.rows(), io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue())


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as values that JSON has."""
    return {
        "keys": list(comparison.keys),
        "implied": list(comparison.implied),
        "objectives": [
            {"objective": name, "goal": comparison.of(name)[0].goal,
             "groups": [grouped(group) for group in comparison.of(name)]}
            for name in comparison.objectives
        ],
        "warnings": list(comparison.warnings),
    }  # fmt: skip
