"""Files of rows: each kind gives the same rows, and what cannot be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from lora_exp.data.reading import files, lines
from lora_exp.errors import DataError

ROWS = [{"prompt": "Größe?", "completion": "1,80 m"}, {"prompt": "a\nb", "completion": '"ok"'}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_bytes(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zstd_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(JSONL)
    return bytes(sink.getvalue())


def arrow_bytes(open_writer: Callable[..., Any]) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(ROWS)
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.txt", b"\xef\xbb\xbf" + JSONL),
        ("rows.jsonl.gz", gzip.compress(JSONL)),
        ("rows.jsonl.bz2", bz2.compress(JSONL)),
        ("rows.jsonl.zst", zstd_bytes()),
        ("rows.csv", csv_bytes(",")),
        ("rows.csv.gz", gzip.compress(csv_bytes(","))),
        ("rows.tsv", csv_bytes("\t")),
        ("rows.parquet", parquet_bytes()),
        ("rows.arrow", arrow_bytes(pyarrow.ipc.new_file)),
        ("stream.arrow", arrow_bytes(pyarrow.ipc.new_stream)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    numbered = list(lines(tmp_path / name))
    assert [row for _, row in numbered] == ROWS
    assert all(where.startswith(str(tmp_path / name)) for where, _ in numbered)


def test_a_saved_data_set_is_read_from_its_folder_and_other_folders_are_refused(
    tmp_path: Path,
) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (path,) = files(str(tmp_path / "saved"))
    assert [row for _, row in lines(path)] == ROWS
    Dataset.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"prompt": "changed"})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert files(str(tmp_path / "saved")) == [path]
    with pytest.raises(DataError, match=r"is a folder; data=hub data\.path=.* or give a glob"):
        files(str(tmp_path))
    with pytest.raises(DataError, match="no file matches"):
        files(str(tmp_path / "*.jsonl"))


def test_objects_of_a_table_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    calls: list[Any] = [{"name": "f", "arguments": {"city": "Oslo", "days": [1, None]}}]
    rows = [{"calls": calls, "label": None}, {"calls": [{"name": "g", "arguments": {"x": 1}}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in lines(tmp_path / "rows.parquet")] == [
        rows[0], rows[1] | {"label": None},
    ]  # fmt: skip


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    text = "word " * 40_000
    (tmp_path / "rows.csv").write_text(f'text\n"{text}"\n')
    assert [row for _, row in lines(tmp_path / "rows.csv")] == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
        ("rows.xlsx", b"PK\x03\x04rest", "is a ZIP archive or spreadsheet; rows are read from"),
        ("rows.jsonl.xz", lzma.compress(JSONL), "is an xz file; rows are read from JSON Lines"),
        ("rows.jsonl", JSONL.decode().encode("utf-16"), "is text in UTF-16; rows are read from"),
        ("rows.pkl", pickle.dumps(ROWS), "is a pickle; rows are read from JSON Lines"),
        ("rows.jsonl.gz", gzip.compress(JSONL)[:-20], r"cannot be decompressed \(gzip\)"),
        ("rows.parquet", parquet_bytes()[:40], "rows.parquet: cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(lines(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": ' + b"7" * 6000 + b"}", r"rows.jsonl:1: a number cannot be read"),
        ("rows.jsonl", b'{"text": "caf\xe9"}', r"/rows.jsonl:1: not UTF-8 at byte 14; [^:]*$"),
        ("rows.yaml", b"- {prompt: a}", "rows.yaml:1: not JSON: .*; rows are read from JSON Lines"),
        ("rows.jsonl", b'{"text": "a"', r"rows.jsonl:1: not JSON: [^;]*$"),
        ("rows.csv", b"prompt,completion\nonly one\n", "rows.csv:2: not the 2 columns"),
        ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: not the 2 columns"),
        ("rows.csv", b'prompt,completion\na,"open\n', "rows.csv:2: not CSV"),
        ("rows.csv", b"prompt,completion\na,caf\xe9\n", "rows.csv:2: not UTF-8; convert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_read_is_returned_as_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ((_, error),) = lines(tmp_path / name)
    assert isinstance(error, DataError)
    assert re.search(message, str(error))
    assert str(error).count(name) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz", "parquet", "arrow"])
def test_a_file_is_read_row_by_row(tmp_path: Path, kind: str) -> None:
    texts = [f"{i} " * 250 for i in range(8000)]  # 9 MB
    path, table = tmp_path / f"rows.{kind}", pyarrow.table({"text": texts})
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=500)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)  # one batch
    elif kind == "csv":
        path.write_text("text,n\n" + "".join(f"{text},1\n" for text in texts))
    else:
        path.write_bytes(gzip.compress(content, 1) if kind == "jsonl.gz" else content)
    del content, table
    before, peak, count = pyarrow.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        for _ in lines(path):
            peak, count = max(peak, pyarrow.total_allocated_bytes() - before), count + 1
        assert tracemalloc.get_traced_memory()[1] < 3_000_000  # of Python, bytes
    finally:
        tracemalloc.stop()
    assert count == len(texts)
    assert peak < 5_000_000  # of Arrow, bytes
