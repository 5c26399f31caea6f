"""Rows: what is read, what is refused, by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_exp.data.rows import _commit, corpus, hub, jsonl, pairs
from lora_exp.data.shapes import where
from lora_exp.data.turns import ROLES
from lora_exp.errors import DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path: str, **options: Any) -> Any:
    defaults = {
        "eval_path": None,
        "eval_share": 0.0,
        "format": "auto",
        "max_rows": None,
        "max_eval_rows": None,
        "chat_template": None,
        "on_error": "raise",
    }
    return jsonl(path, **(defaults | options))


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", {"messages": CHAT}, {"messages": CHAT}),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": CHAT},
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, {"messages": CHAT}),
        (
            "alpaca",
            {"instruction": "do", "input": "x", "output": "a", "system": "be"},
            {
                "messages": [
                    {"role": "system", "content": "be"},
                    {"role": "user", "content": "do\n\nx"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        ),
        (
            "prompt_completion",
            {"prompt": "q", "completion": "a"},
            {"prompt": "q", "completion": "a"},
        ),
        ("prompt_completion", {"prompt": CHAT[:1], "completion": CHAT[1:]}, {"messages": CHAT}),
        ("text", {"text": "t", "extra": 1}, {"text": "t", "extra": 1}),
    ],
)
def test_a_format_is_told_by_its_fields(
    tmp_path: Path, format: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    rows = read(write(tmp_path / "rows.jsonl", row))
    assert (rows.format, rows.train) == (format, [expected])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"text": "x"}, "{broken"], r"rows.jsonl:2: not JSON: .* at column 2"),
        ([{"text": "x"}, '{"text": "y"'], r"rows.jsonl:2: not JSON"),
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
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "rows.jsonl", *lines))


def test_bad_rows_are_skipped_and_listed_where_that_is_asked_for(tmp_path: Path) -> None:
    lines = ['{"text": "x"}', "{broken", '{"text": 7}', '{"text": "y"}', '"text"', "", '{"text"']
    path = write(tmp_path / "rows.jsonl", *lines)
    rows = read(path, on_error="skip")
    assert [row["text"] for row in rows.train] == ["x", "y"]
    assert [why.partition(": ")[0].rpartition(":")[2] for why in rows.skipped] == list("2357")
    assert "field 'text' is 7, not text" in rows.skipped[1]
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"no rows; 1 were skipped, the first: .*rows.jsonl:1: not"):
        read(path, on_error="skip")


def test_latin_1_is_named_with_file_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8 at byte 14; convert"):
        read(str(path))


def test_tool_calls_are_kept_and_need_no_content(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows = read(write(tmp_path / "rows.jsonl", {"messages": turns, "tools": []}))
    assert rows.train[0]["messages"][1] == {
        "role": "assistant", "content": "", "tool_calls": [call],
    }  # fmt: skip


def test_files_of_one_name_keep_a_hash_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", {"text": name})
    assert len(read(f"{tmp_path}/*/rows.jsonl").source) == 2


def test_a_json_list_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "a"}, {"text": "b"}]).encode())
    assert [row["text"] for row in read(str(path)).train] == ["a", "b"]


def test_a_glob_reads_its_files_in_order_and_hashes_each(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "2"})
    write(tmp_path / "a.jsonl", {"text": "1"})
    rows = read(str(tmp_path / "*.jsonl"))
    assert [row["text"] for row in rows.train] == ["1", "2"]
    assert sorted(rows.source) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert all(len(digest) == 64 for digest in rows.source.values())


def test_the_split_is_stable_disjoint_and_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(50)))
    one, two = read(path, eval_share=0.2), read(path, eval_share=0.2)
    assert one == two
    train, held_out = [{row["text"] for row in part} for part in (one.train, one.eval)]
    assert len(held_out) == 10
    assert not train & held_out
    assert len(train | held_out) == 50


def test_limits_apply_to_both_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(50)))
    rows = read(path, eval_path=path, max_rows=7, max_eval_rows=3)
    assert (len(rows.train), len(rows.eval)) == (7, 3)


def test_a_single_row_is_never_held_out(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "rows.jsonl", {"text": "x"}), eval_share=0.5)
    assert (len(rows.train), len(rows.eval)) == (1, 0)


def test_a_folder_of_rows_loads_as_a_hub_data_set_does(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *({"prompt": f"{i}", "completion": "a"} for i in range(10)))
    options: dict[str, Any] = {"eval_split": None, "format": "auto", "on_error": "raise"}
    options |= {"max_rows": None, "max_eval_rows": None, "subset": None, "revision": None}
    options |= {"eval_share": 0.1, "chat_template": None}
    rows = hub(str(tmp_path), split="train", **options)
    assert (rows.format, len(rows.train), len(rows.eval)) == ("prompt_completion", 9, 1)
    with pytest.raises(DataError, match=r"data\.path"):
        hub(str(tmp_path), split="nosplit", **options)


def test_rows_from_the_cache_do_without_the_hubs_answer() -> None:
    assert _commit("some/rows", "0123abc") == "0123abc"  # tests run offline
    assert _commit("some/rows", None).startswith("an unknown commit")


def test_a_chat_template_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"text": "x"})
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert read(rows, chat_template=str(tmp_path / "t.jinja")).chat_template == "{{ messages }}"
    with pytest.raises(DataError, match=r"data.chat_template: no such file"):
        read(rows, chat_template="none.jinja")


def test_the_corpus_holds_its_evaluation_questions_out() -> None:
    rows = corpus(seed=0, rows=5000, eval_rows=300, chat_template=None)
    told = {row["messages"][0]["content"] for row in rows.train}
    asked = {row["messages"][0]["content"] for row in rows.eval if row["task"] != "fact"}
    assert not told & asked
    assert corpus(0, 5000, 300, None) == rows


def test_every_role_is_one_that_chat_templates_know() -> None:
    assert set(ROLES.values()) == {"user", "assistant", "system", "tool"}


def test_generated_pairs_hold_questions_out_and_are_the_same_every_time() -> None:
    rows = pairs(0, 200, 50, None)
    assert (len(rows.train), len(rows.eval), rows.format) == (200, 50, "preference")
    assert rows == pairs(0, 200, 50, None)
    asked = [{row["prompt"][0]["content"] for row in some} for some in (rows.train, rows.eval)]
    assert not asked[0] & asked[1]
    for row in rows.train:
        right, wrong = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert right.split()[::-1] == row["prompt"][0]["content"].removeprefix("Flip: ").split()
        assert right != wrong


def test_the_name_of_rows_in_docs_extending_stays() -> None:
    from lora_exp.data import Rows as public

    assert isinstance(corpus(0, 4, 2, None), public)


def test_generated_rows_keep_the_name_of_their_source_which_resumed_runs_compare() -> None:
    assert corpus(0, 4, 2, None).source == {"lora_exp.corpus": "seed 0, 4 rows"}
    assert pairs(0, 4, 2, None).source == {"lora_exp.corpus": "pairs, seed 0, 4 rows"}


INSTRUCTED = {"instruction": "q", "input": "", "output": "a"}
ASKED = {"prompt": "q", "prompt_id": "7", "messages": CHAT}


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (INSTRUCTED | {"text": "spare"}, "alpaca", {"messages": CHAT}),
        (ASKED, "messages", {"messages": CHAT, "prompt_id": "7"}),
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
    rows = read(write(tmp_path / "rows.jsonl", row, row))
    assert (rows.format, rows.train) == (format, [expected] * 2)


def test_the_history_and_system_prompt_of_alpaca_rows_are_turns(tmp_path: Path) -> None:
    row = INSTRUCTED | {"history": [["a?", "b"], ["c?", "d"]], "system": "be"}
    (read_row,) = read(write(tmp_path / "rows.jsonl", row)).train
    assert [turn["content"] for turn in read_row["messages"]] == [
        "be",
        "a?",
        "b",
        "c?",
        "d",
        "q",
        "a",
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'history' is not a list of pairs"):
        read(write(tmp_path / "rows.jsonl", INSTRUCTED | {"history": [["a?"]]}))


def test_columns_are_renamed_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"ask": "q", "reply": "a", "prompt": "spare"})
    rows = read(path, columns={"prompt": "ask", "completion": "reply"})
    assert (rows.format, rows.train) == ("prompt_completion", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"data.columns: there is no column 'answer'; the columns"):
        read(path, columns={"completion": "answer"})


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
def test_texts_become_turns_where_that_is_asked_for(
    tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read(write(tmp_path / "rows.jsonl", row), as_chat=True).train == [expected]


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"text": "t"}, {"text": ""}),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}),
        (INSTRUCTED, INSTRUCTED | {"output": " "}),
        ({"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"},
         {"prompt": "q", "chosen": "", "rejected": "b"}),
    ],
)  # fmt: skip
def test_rows_with_an_empty_answer_are_left_out_and_counted(
    tmp_path: Path, good: dict[str, Any], empty: dict[str, Any]
) -> None:
    rows = read(write(tmp_path / "rows.jsonl", good, empty, good))
    assert len(rows.train) == 2
    assert rows.warnings == ("1 rows have an empty answer and are left out",)
    assert rows.skipped[0].startswith(str(tmp_path / "rows.jsonl:2"))


def test_prompts_that_end_in_white_space_and_repeated_rows_are_worth_a_warning(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "rows.jsonl", *({"prompt": f"q{i} ", "completion": "a"} for i in "123"))
    rows = read(path, eval_path=path)
    assert "3 of 3 prompts end in white space" in rows.warnings[0]
    assert rows.warnings[1] == "3 of 3 held-out rows are training rows, too"


def test_rows_know_their_lines_and_can_be_left_out_later(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(3))))
    second = where(rows.train[1])
    assert second.endswith("rows.jsonl:2")
    left = rows.without({second: f"{second}: refused"})
    assert [row["text"] for row in left.train] == ["0", "2"]
    assert left.skipped == (f"{second}: refused",)


def test_the_first_five_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [{"text": "x"}, *({"text": i} for i in range(8))]
    with pytest.raises(DataError) as raised:
        read(write(tmp_path / "rows.jsonl", *rows))
    named = [f"rows.jsonl:{line}: " in str(raised.value) for line in range(2, 10)]
    assert named == [True] * 5 + [False] * 3
    assert "and 3 more" in str(raised.value)
