"""Shapes: conversions between them, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.data.shapes import LocatedRow, list_faults, location_of, reshape, shape_of
from lora_exp.data.stored import StoredRows
from lora_exp.errors import DataError

ASK = [{"role": "user", "content": "q"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
CALL = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]


def test_pairs_become_unpaired_rows_and_chats() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "task": "t"}
    unpaired = reshape([pair], "preference", "unpaired_preference")
    assert unpaired == [
        {"prompt": "q", "completion": "a", "label": True, "task": "t"},
        {"prompt": "q", "completion": "b", "label": False, "task": "t"},
    ]
    assert reshape([pair], "preference", "completion") == [
        {"prompt": "q", "completion": "a", "task": "t"}
    ]
    stored = reshape(StoredRows([pair]), "preference", "unpaired_preference")
    assert isinstance(stored, StoredRows)  # still not in memory
    assert stored == unpaired
    chat = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    assert reshape([chat], "preference", "completion") == [{"messages": ASK + GOOD}]


@pytest.mark.parametrize(
    ("format", "row", "prompt", "answer"),
    [
        ("messages", {"messages": ASK + GOOD}, ASK, "good"),
        ("messages", {"messages": ASK + GOOD + ASK}, ASK + GOOD + ASK, None),
        ("messages", {"messages": ASK + CALL}, ASK, None),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, "q", "a"),
        ("prompt_completion", {"prompt": "q", "completion": "a", "answer": "42"}, "q", "42"),
        ("preference", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}, ASK, "good"),
    ],
)
def test_a_row_with_an_answer_becomes_a_prompt_with_its_expected_answer(
    format: str, row: dict[str, Any], prompt: Any, answer: str | None
) -> None:
    assert reshape([row], format, "prompt") == [{"prompt": prompt, "answer": answer}]


def test_rows_that_cannot_be_converted_are_refused_with_both_shapes() -> None:
    with pytest.raises(DataError, match=r"shape preference .* read as text with the fields text"):
        reshape([{"text": "x"}], "text", "preference")
    with pytest.raises(DataError, match="formats that would do: preference, messages"):
        reshape([{"text": "x"}], "text", "prompt")
    with pytest.raises(DataError, match=r"label of 0 and 1 .*data\.format=unpaired_preference"):
        reshape([{"prompt": "q", "completion": "a"}], "prompt_completion", "unpaired_preference")
    assert shape_of("alpaca") == "completion"


@pytest.mark.parametrize("where", ["C:/a b.jsonl:12", "C:/a b.jsonl row 12"])
def test_rows_of_another_shape_name_their_file(where: str) -> None:
    row = LocatedRow({"text": "x"}, where)
    with pytest.raises(DataError, match=r"^C:/a b\.jsonl: the algorithm needs"):
        reshape([row], "text", "preference")


def test_rows_keep_their_location_in_a_new_shape() -> None:
    pair = LocatedRow({"prompt": "q", "chosen": "a", "rejected": "b"}, "rows.jsonl:7")
    unpaired = reshape([pair], "preference", "unpaired_preference")
    assert [location_of(row) for row in unpaired] == ["rows.jsonl:7"] * 2
    assert location_of({"text": "x"}) == "the row {'text': 'x'}"


def test_the_first_five_faults_are_named_and_the_rest_counted() -> None:
    faults = [f"rows.jsonl:{i}: bad" for i in range(1, 9)]
    text = list_faults(faults)
    assert [fault in text for fault in faults] == [True] * 5 + [False] * 3
    assert text.startswith("8 rows cannot be used")
    assert text.endswith("and 3 more")
    assert list_faults(faults[:1]) == faults[0]
