"""Rows in files: JSON Lines, JSON, CSV, Parquet, Arrow, also compressed (gzip, bzip2, Zstandard).

The kind of a file is recognised by its first bytes, CSV by its name. Needs no torch.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

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
SEPARATORS = {".csv": ",", ".tsv": "\t"}


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
        paths = sorted(paths[0].glob("*.arrow"))  # as `Dataset.save_to_disk` writes it
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"no file matches {pattern}")
    return paths


def lines(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Yield where each row was read (`file:line`, or `file row number` without lines), and the row.

    For a row that cannot be read, its error is yielded.

    Raises:
        DataError: the file is of a kind that cannot be read.
    """
    raw = _uncompressed(path.read_bytes(), path)
    plain_path = path.with_suffix("") if path.suffix in (".gz", ".zst", ".bz2") else path
    if raw[:4] == b"PAR1":
        yield from _table_rows(path, _table(pyarrow.parquet.read_table, io.BytesIO(raw), path))
    elif raw[:6] == b"ARROW1" or plain_path.suffix == ".arrow":
        reader = pyarrow.ipc.open_file if raw[:6] == b"ARROW1" else pyarrow.ipc.open_stream
        yield from _table_rows(path, _table(lambda data: reader(data).read_all(), raw, path))
    elif plain_path.suffix in SEPARATORS:
        yield from _separated(raw, path, SEPARATORS[plain_path.suffix])
    else:
        yield from _json(raw.removeprefix(b"\xef\xbb\xbf"), path)


def _uncompressed(raw: bytes, path: Path) -> bytes:
    compression = next((name for magic, name in COMPRESSED.items() if raw.startswith(magic)), None)
    unreadable = next((name for magic, name in OTHERS.items() if raw.startswith(magic)), None)
    if unreadable is not None:
        raise DataError(f"{path} is {unreadable}; {READABLE}")
    if compression is None:
        return raw
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), compression) as stream:
            data: bytes = stream.read()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be decompressed ({compression}): {error}") from error
    return data


def _table(read: Any, data: Any, path: Path) -> Any:
    try:
        return read(data)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _table_rows(path: Path, table: Any) -> Iterator[tuple[str, Row]]:
    number = 0
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def _separated(raw: bytes, path: Path, separator: str) -> Iterator[tuple[str, Row | DataError]]:
    text = _text(raw, f"{path}").removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns = len(reader.fieldnames or ())  # reads the first line
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
            text = f"{where}: not the {columns} columns of the first line"
            yield where, DataError(text)
        else:
            yield where, row


def _json(raw: bytes, path: Path) -> Iterator[tuple[str, Row | DataError]]:
    if raw.lstrip()[:1] == b"[":
        for number, row in enumerate(_parse(raw, f"{path}"), 1):
            yield f"{path} row {number}", row
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
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
        text = f"{where}: not UTF-8 at byte {error.start + 1}; convert the file to UTF-8"
        raise DataError(text) from error


def _parse(raw: bytes, where: str) -> Any:
    text = _text(raw, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # Python reads integers of at most 4300 digits
        raise DataError(f"{where}: a number cannot be read: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
