"""Rows in a temporary file, so that any number of them takes little memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from lora_exp.data.turns import Row
from lora_exp.errors import DataError
from lora_exp.files.paths import cache_dir

BLOCK = 100  # rows read at once


class StoredRows(Sequence[Row]):
    """Rows that are read from a file each time they are asked for.

    A row that is changed by whoever asked for it stays as it was here.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        """Write rows to a file, which is deleted with the last of its rows.

        Args:
            rows: of any number, taken one at a time.

        Raises:
            DataError: the file cannot be written.
        """
        self._file = _RowFile(rows)
        self._numbers: Sequence[int] = range(len(self._file.ends))  # of these rows, in the file

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        """Return a row, or some of the rows in the same file."""
        if isinstance(index, slice):
            return self._some(self._numbers[index])
        return self._file.read([self._numbers[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        """Yield all rows."""
        for start in range(0, len(self._numbers), BLOCK):
            yield from self._file.read(self._numbers[start : start + BLOCK])

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has the same rows."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(row == another for row, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: Iterable[int]) -> StoredRows:
        """Return the rows at some indices, in their order."""
        return self._some(array("Q", (self._numbers[i] for i in indices)))

    def _some(self, numbers: Sequence[int]) -> StoredRows:
        some = StoredRows.__new__(StoredRows)
        some._file, some._numbers = self._file, numbers
        return some


class _RowFile:
    """A file of pickled rows; it has no name, so nothing else reads or writes it."""

    def __init__(self, rows: Iterable[Row]) -> None:
        folder = cache_dir() / "rows"
        self.ends = array("Q")  # of each row, bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise _unwritable(error) from error
        end = 0
        for row in rows:
            pickled = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
            end += len(pickled)
            self.ends.append(end)
            self._write(pickled)
        self._write(b"", flush=True)

    def _write(self, pickled: bytes, flush: bool = False) -> None:
        try:
            self.file.write(pickled)
            if flush:
                self.file.flush()
        except OSError as error:
            raise _unwritable(error) from error

    def read(self, numbers: Sequence[int]) -> list[Row]:
        """Return rows; those that lie close to each other are read at once."""
        first, last = min(numbers), max(numbers)
        if last - first > 2 * len(numbers):
            return [row for number in numbers for row in self.read([number])]
        start = self.ends[first - 1] if first else 0
        # not seek and read: processes that were forked share the position in the file
        raw = memoryview(os.pread(self.file.fileno(), self.ends[last] - start, start))
        begins = (self.ends[number - 1] if number else 0 for number in numbers)
        return [
            pickle.loads(raw[begin - start : self.ends[number] - start])
            for number, begin in zip(numbers, begins, strict=True)
        ]

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def _unwritable(error: OSError) -> DataError:
    text = f"{cache_dir() / 'rows'}: rows cannot be written: {error.strerror}"
    return DataError(f"{text}; LORA_EXP_CACHE=<folder> gives another place")


def selected(rows: Sequence[Row], indices: Iterable[int]) -> Sequence[Row]:
    """Return the rows at some indices, stored as the rows are."""
    return rows.select(indices) if isinstance(rows, StoredRows) else [rows[i] for i in indices]
