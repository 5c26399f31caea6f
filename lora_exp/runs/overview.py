"""What `lora-exp runs` prints: a line for each run, no wider than the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from lora_exp.record.console import short, size
from lora_exp.runs.listing import Row

LEFT_OUT_FIRST = ("sweep", "size", "time", "steps", "date")  # where there is no room for all
LONG = {"name": 24, "differs": 32}  # narrower than this they are only where that is not enough
LEAST = 12  # characters that a column keeps
RIGHT = ("objective", "steps", "time", "size")
GAP = "  "


def overview(rows: Sequence[Row], columns: Sequence[str], width: int | None) -> str:
    """Return the page: a line for each run, what is wrong with damaged ones, how many there are.

    Args:
        rows: in their order.
        columns: keys of values; those that there is no room for are left out, which the page says.
        width: of the terminal; None: lines are as long as need be, as programs read them.
    """
    texts = {c: [c, *(_shown(c, row.value(c)) for row in rows)] for c in columns}
    widths = {column: max(map(cell_len, cells)) for column, cells in texts.items()}
    left_out = _fit(widths, width) if width is not None else []
    lines = [_line(cells, widths) for cells in _transposed(texts, len(rows) + 1)]
    lines += [f"damaged: {row.run.directory}: {row.run.problem}" for row in rows if row.run.problem]
    if left_out:
        lines.append(f"no room for {', '.join(left_out)}: a wider terminal, --columns or --json")
    return "\n".join([*lines, _totals(rows)])


def _fit(widths: dict[str, int], width: int) -> list[str]:
    """Leave out and narrow columns until a line fits; return those that were left out.

    The last column stays: a path that one copies is not cut.
    """
    left_out = []
    for column, longest in LONG.items():
        if column in widths and _total(widths) > width:
            widths[column] = min(widths[column], longest)
    for column in LEFT_OUT_FIRST:
        if _total(widths) > width and column in widths:
            del widths[column]
            left_out.append(column)
    last = [*widths][-1]
    while (excess := _total(widths) - width) > 0:
        widest = max(widths.keys() - {last}, key=lambda column: widths[column], default=last)
        if widths[widest] <= LEAST:
            break
        widths[widest] = max(LEAST, widths[widest] - excess)
    return left_out


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _transposed(texts: Mapping[str, Sequence[str]], count: int) -> list[dict[str, str]]:
    return [{column: cells[i] for column, cells in texts.items()} for i in range(count)]


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    last = [*widths][-1]
    return GAP.join(
        cells[column] if column == last else _padded(cells[column], width, column in RIGHT)
        for column, width in widths.items()
    ).rstrip()


def _padded(text: str, width: int, right: bool) -> str:
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…"
    space = " " * (width - length)
    return space + text if right else text + space


def _shown(column: str, value: Any) -> str:
    """Return a value as a line shows it."""
    if value is None:
        return ""
    if column == "size":
        return size(value)
    if column == "time":
        return duration(value)
    if column == "date":
        return local_time(value)
    if column == "sweep":
        return Path(value).name
    if isinstance(value, Mapping):
        value = " ".join(f"{key}={word}" for key, word in value.items())
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = short(value) if is_number else str(value)
    # a line break or an escape sequence would change the table
    return "".join(c if c.isprintable() else " " for c in text)


def duration(seconds: float) -> str:
    """Return seconds as `45 s`, `12:05` or `3:00:12`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def local_time(text: str) -> str:
    """Return a time of a record in the time of this place, without seconds."""
    try:
        return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):
        return text


def _totals(rows: Sequence[Row]) -> str:
    """Return how many runs there are, by status."""
    counts = Counter(str(row.value("status")) for row in rows)
    texts = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}{': ' if texts else ''}{texts}"
