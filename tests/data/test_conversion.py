"""Conversion: which rows are converted, renamed, skipped or refused, and with what error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_exp.errors import DataError
from tests.data.test_rows import CHAT, INSTRUCTION_ROW, read_rows, write_lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "x"}, "{broken"], r"rows.jsonl:2: not JSON: .* at column 2"),
        ([{"text": "x"}, '{"text": "y"'], r"rows.jsonl:2: not JSON: .* at column 13"),
        (["[", '  {"text": "x"},', '  {"text": "y",}', "]"], r"not JSON: .* at line 3, column \d"),
        (["[]" + "x"], r"rows.jsonl row|not JSON"),
        (['"text"'], r"rows.jsonl:1: a row is an object"),
        ([{"text": "x"}, {"txt": "y"}], r"rows.jsonl:2: field 'text' is missing \(read as text\)"),
        ([{"text": None}], r"rows.jsonl:1: field 'text' is null, not text"),
        ([{"text": 7}], r"rows.jsonl:1: field 'text' is 7, not text"),
        ([{"text": ""}], r"rows.jsonl:1: field 'text' is empty"),
        (['{"text": "\\ud800"}'], r"rows.jsonl:1: field 'text' holds half a surrogate"),
        ([{"prompt": "q", "completion": ""}], r"field 'completion' is empty"),
        ([{"a": 1, "b": 2}], r"rows.jsonl:1: fields \['a', 'b'\] are of no known format"),
        ([{"messages": []}], r"field 'messages' is not a list of turns"),
        ([{"messages": ["x"]}], r"messages\[0\] is not an object"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], r"messages\[0\].role is 'bot'"),
        ([{"messages": [{"role": ["x"], "content": "x"}]}], r"messages\[0\].role is \['x'\]"),
        (["[" * 100_000], r"rows.jsonl( row 1)?: (nested too deeply|not JSON)"),
        ([{"messages": [{"role": "user"}]}], r"messages\[0\]: field 'content' is missing"),
        ([{"messages": CHAT[:1]}], r"'messages' has no assistant turn"),
        ([], r"rows.jsonl: no rows"),
        ([{"text": "x", "image": None}, {"text": "y", "image": "cat.png"}],
         r"rows.jsonl:2: field 'image' is not empty; only text can be trained on"),
        ([{"messages": CHAT, "audios": ["a.wav"]}], r"rows.jsonl:1: field 'audios' is not empty"),
        ([{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]}],
         r"rows.jsonl:1: messages\[0\].content\[0\] is of type 'image'; only text"),
    ],
)  # fmt: skip
def test_an_unusable_row_is_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write_lines(tmp_path / "rows.jsonl", *lines))


def test_bad_rows_are_skipped_and_listed_with_on_error_skip(tmp_path: Path) -> None:
    lines = ['{"text": "x"}', "{broken", '{"text": 7}', '{"text": "y"}', '"text"', "", '{"text"']
    path = write_lines(tmp_path / "rows.jsonl", *lines)
    rows = read_rows(path, on_error="skip")
    assert [row["text"] for row in rows.train] == ["x", "y"]
    assert [reason.partition(": ")[0].rpartition(":")[2] for reason in rows.skipped] == list("2357")
    assert "field 'text' is 7, not text" in rows.skipped[1]
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"no rows; 1 were skipped, the first: .*rows.jsonl:1: not"):
        read_rows(path, on_error="skip")


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (INSTRUCTION_ROW | {"text": "spare"}, "alpaca", {"messages": CHAT}),
        ({"prompt": "q", "id": "7", "messages": CHAT}, "messages", {"messages": CHAT, "id": "7"}),
        ({"text": "t", "label": 3, "prompt": "spare"}, "text", {"text": "t"}),
        ({"question": "q", "answer": "a", "id": 1}, "alpaca", {"messages": CHAT, "id": 1}),
        ({"query": "q", "response": "a"}, "alpaca", {"messages": CHAT}),
        ({"instruction": "q", "context": "", "response": "a"}, "alpaca", {"messages": CHAT}),
        ({"instruction": "q", "response": "a"}, "alpaca", {"messages": CHAT}),
        ({"input": "q", "output": "a"}, "alpaca", {"messages": CHAT}),
        ({"prompt": "q", "completion": "a", "messages": CHAT}, "messages", {"messages": CHAT}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c"}, "preference",
         {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ],
)  # fmt: skip
def test_columns_of_other_formats_are_never_trained_on(
    tmp_path: Path, row: dict[str, Any], format: str, expected: dict[str, Any]
) -> None:
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", row, row))
    assert (rows.format, rows.train) == (format, [expected] * 2)


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"ask": "q", "reply": "a", "prompt": "spare"})
    rows = read_rows(path, columns={"prompt": "ask", "completion": "reply"})
    assert (rows.format, rows.train) == ("prompt_completion", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"data.columns: there is no column 'answer'; the columns"):
        read_rows(path, columns={"completion": "answer"})


def test_only_the_first_row_must_have_every_renamed_column(tmp_path: Path) -> None:
    chats = [{"turns": CHAT, "rule": "Be brief."}, {"turns": CHAT}]
    path = write_lines(tmp_path / "rows.jsonl", *chats)
    rows = read_rows(path, columns={"messages": "turns", "system": "rule"})
    assert [len(row["messages"]) for row in rows.train] == [len(CHAT) + 1, len(CHAT)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"messages": CHAT}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"},
         {"prompt": CHAT[:1], "chosen": CHAT[1:],
          "rejected": [{"role": "assistant", "content": "b"}]}),
        ({"prompt": "q", "completion": "a", "label": True},
         {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True}),
        ({"prompt": "q"}, {"prompt": CHAT[:1]}),
        ({"text": "t"}, {"text": "t"}),
    ],
)  # fmt: skip
def test_texts_become_turns_with_as_chat(
    tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read_rows(write_lines(tmp_path / "rows.jsonl", row), as_chat=True).train == [expected]


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"text": "t"}, {"text": ""}),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}),
        (INSTRUCTION_ROW, INSTRUCTION_ROW | {"output": " "}),
        ({"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"},
         {"prompt": "q", "chosen": "", "rejected": "b"}),
    ],
)  # fmt: skip
def test_rows_with_an_empty_answer_are_left_out_and_counted(
    tmp_path: Path, good: dict[str, Any], empty: dict[str, Any]
) -> None:
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", good, empty, good))
    assert len(rows.train) == 2
    assert rows.warnings == ("1 rows have an empty answer and are left out",)
    assert rows.skipped[0].startswith(str(tmp_path / "rows.jsonl:2"))


def test_the_first_five_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [{"text": "x"}, *({"text": i} for i in range(8))]
    with pytest.raises(DataError) as error:
        read_rows(write_lines(tmp_path / "rows.jsonl", *rows))
    named = [f"rows.jsonl:{line}: " in str(error.value) for line in range(2, 10)]
    assert named == [True] * 5 + [False] * 3
    assert "and 3 more" in str(error.value)
