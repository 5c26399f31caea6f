"""Stored rows: a sequence of rows like a list, in a file that goes with the last of them."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import pytest

from lora_exp.data.shapes import LocatedRow, location_of
from lora_exp.data.stored import StoredRows, selected
from lora_exp.errors import DataError

ROWS = [{"prompt": f"é {i}", "meta": {"n": i, "none": None}} for i in range(30)]


def test_rows_are_those_that_were_given() -> None:
    stored = StoredRows(iter(ROWS))
    assert len(stored) == 30
    assert list(stored) == ROWS
    assert (stored[0], stored[-1]) == (ROWS[0], ROWS[-1])
    assert stored == ROWS == stored
    assert stored != ROWS[1:]
    assert stored != [*ROWS[1:], ROWS[0]]
    with pytest.raises(IndexError):
        stored[30]


def test_parts_and_parts_of_parts_are_those_of_a_list() -> None:
    stored = StoredRows(ROWS)
    some = selected(stored, [9, 3, 20])
    assert list(some) == [ROWS[9], ROWS[3], ROWS[20]] == selected(ROWS, [9, 3, 20])
    assert list(some[1:]) == [ROWS[3], ROWS[20]]
    assert list(selected(some[1:], [1])) == [ROWS[20]]
    assert list(stored[25:99]) == ROWS[25:99]
    assert not stored[:0]


def test_a_row_keeps_where_it_was_read_and_a_change_of_it_is_not_stored() -> None:
    stored = StoredRows([LocatedRow({"text": "x"}, "rows.jsonl:7")])
    row = stored[0]
    assert location_of(row) == "rows.jsonl:7"
    row["text"] = "changed"
    assert stored[0] == {"text": "x"}


def test_the_file_has_no_name_and_is_closed_with_its_last_part() -> None:
    stored = StoredRows(ROWS)
    part, number = stored[3:5], stored._file.file.fileno()
    assert not list((Path(os.environ["LORA_EXP_CACHE"]) / "rows").iterdir())
    del stored
    gc.collect()
    assert list(part) == ROWS[3:5]
    del part
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/rows: rows cannot be written: .*LORA_EXP_CACHE"):
        StoredRows(ROWS)


def test_the_memory_of_rows_does_not_grow_with_their_texts() -> None:
    tracemalloc.start()
    try:
        stored = StoredRows({"text": f"{i} " * 200} for i in range(20_000))
        for step in (2, 200):
            some = selected(stored, range(0, 20_000, step))
            assert sum(len(row["text"]) for row in some) > 10_000_000 / step
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the peak, bytes
    finally:
        tracemalloc.stop()
