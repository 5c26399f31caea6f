"""Rows as they were read, converted to the shape of their format; faulty rows raise or are skipped.

Knows nothing of files or tokens; needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.data.formats import EmptyAnswer, detect, read_as
from lora_exp.data.reading import OnError
from lora_exp.data.shapes import LocatedRow, list_faults
from lora_exp.data.stored import StoredRows
from lora_exp.data.turns import FieldError, Row
from lora_exp.errors import DataError

Columns = dict[str, str] | None


@dataclass(frozen=True)
class Converted:
    """Rows in the shape of their format, and those that were left out."""

    rows: Sequence[Row]
    format: str
    skipped: list[str]
    empty: int  # number of skipped rows without an answer


def convert(
    rows: Iterable[tuple[str, Any]],
    format: str,
    source: str,
    on_error: OnError,
    columns: Columns = None,
    as_chat: bool = False,
) -> Converted:
    """Convert rows to the shape of their format; with format `auto` the first row decides it.

    A row whose answer is empty is left out, also with `on_error="raise"`.

    Args:
        rows: each with where it was read; a row that could not be read is its error.
        format: of all rows.
        source: path or name, for errors.
        on_error: what to do with rows that cannot be used.
        columns: field -> the column with its values.
        as_chat: whether plain texts of prompts and answers become turns.

    Raises:
        DataError: rows cannot be used (file, line and field are named), or there are no rows.
    """
    conversion = _Conversion(format, on_error, columns, as_chat)
    converted = StoredRows(conversion.converted(rows))
    skipped = conversion.skipped
    if conversion.faults:
        raise DataError(list_faults(conversion.faults))
    if not converted:
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{source}: no rows{why}")
    return Converted(converted, conversion.format, skipped, conversion.empty)


class _Conversion:
    """Converts rows one after the other, and notes what it leaves out."""

    def __init__(self, format: str, on_error: OnError, columns: Columns, as_chat: bool) -> None:
        self.format, self.columns, self.as_chat = format, columns, as_chat
        self.skipped: list[str] = []
        self.faults: list[str] = []
        self.refused = self.faults if on_error == "raise" else self.skipped
        self.is_renamed = False  # whether a row had all columns
        self.empty = 0

    def converted(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Row]:
        """Yield the rows that can be used."""
        for where, row in rows:
            try:
                renamed = self._renamed(validate(row, where), where)
                if self.format == "auto":
                    self.format = detect(renamed, where)
                yield _converted(renamed, self.format, self.as_chat, where)
            except EmptyAnswer as error:
                self.empty += 1
                self.skipped.append(f"{where}: {error}")
            except DataError as error:
                self.refused.append(str(error))
                if self.format == "auto":  # without a format no row can be read
                    return

    def _renamed(self, row: Row, where: str) -> Row:
        """Rename columns to the fields whose values they have; later rows may lack some.

        Raises:
            DataError: the first row lacks a column.
        """
        columns = self.columns or {}
        missing = sorted(set(columns.values()) - row.keys())
        if missing and not self.is_renamed:
            text = f"data.columns: there is no column {missing[0]!r}; the columns are {sorted(row)}"
            raise DataError(f"{where}: {text}")
        self.is_renamed = True
        others = {key: value for key, value in row.items() if key not in columns.values()}
        names = {field: column for field, column in columns.items() if column in row}
        return others | {field: row[column] for field, column in names.items()}


def _converted(row: Row, format: str, as_chat: bool, where: str) -> Row:
    try:
        return LocatedRow(read_as(format, row, as_chat), where)
    except EmptyAnswer:
        raise
    except FieldError as error:
        raise DataError(f"{where}: {error} (read as {format})") from None


def validate(row: Any, where: str) -> Row:
    """Return a row if it is an object that can be written as UTF-8.

    Raises:
        DataError: it is not, or could not be read.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object {{...}}, this is {type(row).__name__}")
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            text = f"field {field!r} holds half a surrogate pair, which is no text"
            raise DataError(f"{where}: {text}") from None
    return row
