"""The shapes of rows that algorithms learn from, and conversions between them.

A shape is the set of fields that a row has after reading; other columns are kept. A text is a
string or, in chats, a list of turns:

completion            `messages`; or `prompt` and `completion`; or `text`
preference            `prompt`, `chosen`, `rejected`
unpaired_preference   `prompt`, `completion`, `label` (true: good)
prompt                `prompt`, and `answer` if it is known
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_exp.data.formats import FORMATS, uncounted
from lora_exp.data.stored import StoredRows
from lora_exp.data.turns import Row
from lora_exp.errors import DataError

SHAPES: dict[str, set[str]] = {
    "completion": {"messages", "text", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
    "prompt": {"prompt"},
}
LABELLED = "; a column label of 0 and 1 is read with data.format=unpaired_preference"
PLACE = re.compile(r"(:| row )\d+$")  # of a row in its file
MAX_LISTED = 5  # faulty rows that an error lists


class LocatedRow(dict[str, Any]):
    """A row with where it was read, as `file:line`."""

    def __init__(self, row: Row, where: str) -> None:
        """Keep the row's fields, and `file:line`."""
        super().__init__(row)
        self.where = where


def location_of(row: Row) -> str:
    """Return where a row was read; if it was not read from a file, its first characters."""
    return row.where if isinstance(row, LocatedRow) else f"the row {str(row)[:80]}"


def list_faults(faults: list[str]) -> str:
    """Return the first faults as text, and how many more there are."""
    if len(faults) == 1:
        return faults[0]
    more = f"\n  and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    text = "\n  ".join(faults[:MAX_LISTED])
    return (
        f"{len(faults)} rows cannot be used (data.on_error=skip leaves them out):\n  {text}{more}"
    )


def shape_of(format: str) -> str:
    """Return the shape of rows of a format."""
    return format if format in SHAPES else "completion"


def reshape(rows: Sequence[Row], format: str, shape: str) -> Sequence[Row]:
    """Convert rows to the shape that an algorithm learns from.

    A pair becomes two unpaired rows, or the prompt with its chosen answer; a row with an answer
    becomes a prompt whose `answer` is known.

    Args:
        rows: as read.
        format: the format in which they were read.
        shape: one of `SHAPES`.

    Raises:
        DataError: they lack fields that the shape needs; what was read and what is needed is named.
    """
    source_shape = shape_of(format)
    if source_shape == shape:
        return rows
    convert = CONVERSIONS.get((source_shape, shape))
    if convert is None or (shape == "prompt" and format == "text"):
        fields = ", ".join(sorted(rows[0])) if rows else "nothing"
        is_located = bool(rows) and isinstance(rows[0], LocatedRow)
        where = f"{PLACE.sub('', location_of(rows[0]))}: " if is_located else ""
        usable = [f for f in FORMATS if (shape_of(f), shape) in CONVERSIONS or shape_of(f) == shape]
        needed = f"rows of shape {shape} ({', '.join(sorted(SHAPES[shape]))})"
        raise DataError(
            f"{where}the algorithm needs {needed}, but these were read as {format}"
            f" with the fields {fields}; formats that would do:"
            f" {', '.join(usable)} (data.columns={{its name: yours}} renames fields)"
            + LABELLED
            * (shape == "unpaired_preference" and format == "prompt_completion")
        )
    reshaped = (_at(row, new) for row in rows for new in convert(row))
    return StoredRows(reshaped) if isinstance(rows, StoredRows) else list(reshaped)


def _at(row: Row, new: Row) -> Row:
    return LocatedRow(new, row.where) if isinstance(row, LocatedRow) else new


def _without(row: Row, *fields: str) -> Row:
    return {key: value for key, value in row.items() if key not in fields}


def _to_unpaired(row: Row) -> list[Row]:
    rest = _without(row, "chosen", "rejected")
    pair = (("chosen", True), ("rejected", False))
    return [rest | {"completion": row[field], "label": label} for field, label in pair]


def _to_chosen(row: Row) -> list[Row]:
    rest = _without(row, "prompt", "chosen", "rejected")
    if isinstance(row["chosen"], list):
        return [rest | {"messages": uncounted(row["prompt"]) + row["chosen"]}]
    return [rest | {"prompt": row["prompt"], "completion": row["chosen"]}]


def _to_prompt(row: Row) -> list[Row]:
    if "chosen" in row:
        (row,) = _to_chosen(row)
    if "messages" not in row:
        answer = row.get("answer", row["completion"])
        return [_without(row, "completion") | {"prompt": row["prompt"], "answer": answer}]
    *prompt, last = row["messages"]
    if last["role"] != "assistant":
        prompt, last = row["messages"], {"content": None}
    rest = _without(row, "messages")
    known = last["content"] or None  # a call alone is no text to compare with
    return [rest | {"prompt": prompt, "answer": rest.get("answer", known)}]


CONVERSIONS: dict[tuple[str, str], Callable[[Row], list[Row]]] = {
    ("preference", "unpaired_preference"): _to_unpaired,
    ("preference", "completion"): _to_chosen,
    ("preference", "prompt"): _to_prompt,
    ("completion", "prompt"): _to_prompt,
}
