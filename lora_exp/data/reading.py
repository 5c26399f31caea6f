"""Rows in files: JSON Lines, JSON, CSV, Parquet, Arrow, also compressed (gzip, bzip2, Zstandard).

The kind of a file is recognised by its first bytes, CSV by its name. Needs no torch, and pyarrow
only to read: every command composes with what is here, and pyarrow takes a fifth of that time.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lora_exp.data.turns import Row
from lora_exp.errors import DataError
from lora_exp.files.paths import asset

OnError = Literal["raise", "skip"]
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
OTHERS = {
    b"PK\x03\x04": "a ZIP archive or spreadsheet", b"\xfd7zXZ": "an xz file",
    b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16",
    b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
}  # fmt: skip
READABLE = "rows are read from JSON Lines, JSON, CSV, Parquet or Arrow, also .gz, .bz2 and .zst"
CONVERT = "convert the file to UTF-8"
BATCH = 1000  # rows of a table that are Python objects at a time
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FIELD = 2**31 - 1  # characters of a CSV field; C's long has no more on every system


def files(pattern: str) -> list[Path]:
    """Return the files of a path or a glob, sorted; for a folder its Arrow files.

    Raises:
        DataError: there is no such file.
    """
    paths = sorted(Path(p) for p in glob.glob(str(asset(pattern)), recursive=True))  # noqa: PTH207
    if len(paths) == 1 and paths[0].is_dir():
        if not (paths[0] / "state.json").is_file():
            text = f"{pattern} is a folder; data=hub data.path={pattern} reads the files in one"
            raise DataError(f"{text}, or give a glob such as '{pattern}/*.jsonl'")
        paths = _data_files(paths[0])
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"no file matches {pattern}")
    return paths


def _data_files(folder: Path) -> list[Path]:
    """Return the files of a data set that `Dataset.save_to_disk` wrote.

    Beside them lie `cache-*.arrow`, which `datasets` writes when it changes or selects rows.

    Raises:
        DataError: its list of files cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} cannot be read: {error!r}") from error


def lines(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Yield where each row was read (`file:line`, or `file row number` without lines), and the row.

    For a row that cannot be read, its error is yielded. One row after the other is read, so a file
    may be larger than memory; only a single JSON array is read as a whole.

    Raises:
        DataError: the file is of a kind that cannot be read.
    """
    plain_path = path.with_suffix("") if path.suffix in (".gz", ".zst", ".bz2") else path
    with _uncompressed(path) as stream:
        start = stream.peek(6)
        if start[:4] == b"PAR1":
            yield from _table_rows(path, _parquet_batches(stream))
        elif start[:6] == b"ARROW1" or plain_path.suffix == ".arrow":
            yield from _table_rows(path, _arrow_batches(stream, start[:6] == b"ARROW1"))
        elif plain_path.suffix in SEPARATORS:
            yield from _separated(stream, path, SEPARATORS[plain_path.suffix])
        else:
            yield from _json(stream, path)


@contextmanager
def _uncompressed(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        start = file.peek(6)
        if unreadable := _by_magic(OTHERS, start):
            raise DataError(f"{path} is {unreadable}; {READABLE}")
        compression = _by_magic(COMPRESSED, start)
        if compression is None:
            yield file
            return
        import pyarrow

        try:
            with pyarrow.CompressedInputStream(file, compression) as stream:
                yield io.BufferedReader(stream)
        except (OSError, pyarrow.ArrowInvalid) as error:
            text = f"{path}: cannot be decompressed ({compression}): {error}"
            raise DataError(text) from error


def _by_magic(names: dict[bytes, str], start: bytes) -> str | None:
    return next((name for magic, name in names.items() if start.startswith(magic)), None)


def _parquet_batches(stream: io.BufferedReader) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(_seekable(stream)).iter_batches(batch_size=BATCH)


def _arrow_batches(stream: io.BufferedReader, is_file: bool) -> Iterator[Any]:
    import pyarrow

    if not is_file:
        yield from pyarrow.ipc.open_stream(stream)
        return
    file = pyarrow.ipc.open_file(_seekable(stream))
    yield from map(file.get_batch, range(file.num_record_batches))


def _seekable(stream: io.BufferedReader) -> Any:
    """Return a file of which any part can be read; one that was compressed is held in memory."""
    import pyarrow

    if isinstance(stream.raw, io.FileIO):
        return pyarrow.memory_map(str(stream.name))
    return pyarrow.BufferReader(stream.read())


def _table_rows(path: Path, batches: Iterator[Any]) -> Iterator[tuple[str, Row]]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield f"{path} row {number}", without_nulls(row)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def without_nulls(row: Row) -> Row:
    """Return a table's row whose objects have no empty keys.

    A table gives each object the keys of all objects in its column: a call of one tool has the
    arguments of every other one.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _separated(
    stream: io.BufferedReader, path: Path, separator: str
) -> Iterator[tuple[str, Row | DataError]]:
    csv.field_size_limit(FIELD)  # of this process; else a field has at most 131,072 characters
    # bytes that are not UTF-8 become halves of surrogate pairs, so that their row can be named
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        names = list(reader.fieldnames or ())  # reads the first line
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}: the first line names the column {twice[0]!r} twice")
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield where, DataError(f"{where}: not CSV: {error}")
                return  # after an open quote the rest cannot be split into rows
            if row is None:
                return
            if None in row or None in row.values():
                fault = f"{where}: not the {len(names)} columns of the first line"
                yield where, DataError(fault)
            elif not _is_utf8([*names, *row.values()]):
                yield where, DataError(f"{where}: not UTF-8; {CONVERT}")
            else:
                yield where, row


def _is_utf8(texts: list[str]) -> bool:
    """Return whether texts that were decoded with `surrogateescape` were UTF-8."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, Row | DataError]]:
    without_mark = stream.readline().removeprefix(b"\xef\xbb\xbf")
    numbered = enumerate(chain([without_mark], stream), 1)
    filled = ((number, line) for number, line in numbered if line.strip())
    first = True
    for number, line in filled:
        if first and line.lstrip()[:1] == b"[":
            for n, row in enumerate(_parse(line + stream.read(), f"{path}"), 1):
                yield f"{path} row {n}", row
            return
        first = False
        where = f"{path}:{number}"
        try:
            yield where, _parse(line, where)
        except DataError as error:
            is_json = line.lstrip()[:1] == b"{" or number > 1
            yield where, error if is_json else DataError(f"{error}; {READABLE}")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start + 1}; {CONVERT}") from error


def _parse(raw: bytes, where: str) -> Any:
    text = _text(raw, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {min(error.pos, len(text.rstrip())) + 1}"  # a line's end is white space
        if "\n" in text.rstrip():
            at = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON: {error.msg} at {at}") from error
    except ValueError as error:  # Python reads integers of at most 4300 digits
        raise DataError(f"{where}: a number cannot be read: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
