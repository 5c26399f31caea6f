"""Rows: files and hub data sets as rows, their split, source and warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_exp.data.rows import _commit, corpus, hub, jsonl, pairs
from lora_exp.data.shapes import location_of
from lora_exp.data.turns import ROLES
from lora_exp.errors import DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write_lines(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_rows(path: str, **options: Any) -> Any:
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
def test_a_format_is_recognised_by_its_fields(
    tmp_path: Path, format: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", row))
    assert (rows.format, rows.train) == (format, [expected])


def test_latin_1_is_named_with_file_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8 at byte 14; convert"):
        read_rows(str(path))


def test_tool_calls_are_kept_and_need_no_content(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", {"messages": turns, "tools": []}))
    assert rows.train[0]["messages"][1] == {
        "role": "assistant", "content": "", "tool_calls": [call],
    }  # fmt: skip


def test_files_of_one_name_keep_a_hash_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "rows.jsonl", {"text": name})
    assert len(read_rows(f"{tmp_path}/*/rows.jsonl").source) == 2


def test_a_json_list_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "a"}, {"text": "b"}]).encode())
    assert [row["text"] for row in read_rows(str(path)).train] == ["a", "b"]


def test_a_glob_reads_its_files_in_order_and_hashes_each(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", {"text": "2"})
    write_lines(tmp_path / "a.jsonl", {"text": "1"})
    rows = read_rows(str(tmp_path / "*.jsonl"))
    assert [row["text"] for row in rows.train] == ["1", "2"]
    assert sorted(rows.source) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert all(len(digest) == 64 for digest in rows.source.values())


def test_the_split_is_stable_disjoint_and_complete(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(50)))
    first, second = (read_rows(path, eval_share=0.2, num_proc=2) for _ in range(2))
    assert first.num_proc == 2
    assert first == second
    train, held_out = [{row["text"] for row in part} for part in (first.train, first.eval)]
    assert len(held_out) == 10
    assert not train & held_out
    assert len(train | held_out) == 50


def test_limits_apply_to_both_parts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(50)))
    rows = read_rows(path, eval_path=path, max_rows=7, max_eval_rows=3)
    assert (len(rows.train), len(rows.eval)) == (7, 3)


def test_a_single_row_is_never_held_out(tmp_path: Path) -> None:
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", {"text": "x"}), eval_share=0.5)
    assert (len(rows.train), len(rows.eval)) == (1, 0)


def test_a_folder_of_rows_loads_like_a_hub_data_set(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "train.jsonl", *({"prompt": f"{i}", "completion": "a"} for i in range(10))
    )
    options: dict[str, Any] = {"eval_split": None, "format": "auto", "on_error": "raise"}
    options |= {"max_rows": None, "max_eval_rows": None, "subset": None, "revision": None}
    options |= {"eval_share": 0.1, "chat_template": None}
    rows = hub(str(tmp_path), split="train", **options)
    assert (rows.format, len(rows.train), len(rows.eval)) == ("prompt_completion", 9, 1)
    with pytest.raises(DataError, match=r"data\.path"):
        hub(str(tmp_path), split="nosplit", **options)
    (tmp_path / "state.json").write_text("{}")  # as save_to_disk leaves it
    with pytest.raises(
        DataError, match=rf"save_to_disk; data=jsonl data\.path={tmp_path} reads it"
    ):
        hub(str(tmp_path), split="train", **options)


def test_without_a_network_the_commit_is_the_revision_or_unknown() -> None:
    assert _commit("some/rows", "0123abc") == "0123abc"  # tests run offline
    assert _commit("some/rows", None).startswith("an unknown commit")


def test_a_chat_template_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", {"text": "x"})
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert (
        read_rows(rows, chat_template=str(tmp_path / "t.jinja")).chat_template == "{{ messages }}"
    )
    with pytest.raises(DataError, match=r"data.chat_template: no such file"):
        read_rows(rows, chat_template="none.jinja")


def test_the_corpus_does_not_train_on_its_evaluation_questions() -> None:
    rows = corpus(seed=0, rows=5000, eval_rows=300, chat_template=None)
    train_questions = {row["messages"][0]["content"] for row in rows.train}
    eval_questions = {row["messages"][0]["content"] for row in rows.eval if row["task"] != "fact"}
    assert not train_questions & eval_questions
    assert corpus(0, 5000, 300, None) == rows


def test_every_role_is_known_to_chat_templates() -> None:
    assert set(ROLES.values()) == {"user", "assistant", "system", "tool"}


def test_generated_pairs_are_reproducible_and_do_not_share_questions() -> None:
    rows = pairs(0, 200, 50, None)
    assert (len(rows.train), len(rows.eval), rows.format) == (200, 50, "preference")
    assert rows == pairs(0, 200, 50, None)
    questions = [
        {row["prompt"][0]["content"] for row in split} for split in (rows.train, rows.eval)
    ]
    assert not questions[0] & questions[1]
    for row in rows.train:
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert chosen.split()[::-1] == row["prompt"][0]["content"].removeprefix("Flip: ").split()
        assert chosen != rejected


def test_rows_can_be_imported_as_docs_extending_shows() -> None:
    from lora_exp.data import Rows as public

    assert isinstance(corpus(0, 4, 2, None), public)


def test_generated_rows_keep_their_source_name_for_resumed_runs() -> None:
    assert corpus(0, 4, 2, None).source == {"lora_exp.corpus": "seed 0, 4 rows"}
    assert pairs(0, 4, 2, None).source == {"lora_exp.corpus": "pairs, seed 0, 4 rows"}


INSTRUCTION_ROW = {"instruction": "q", "input": "", "output": "a"}


def test_the_history_and_system_prompt_of_alpaca_rows_are_turns(tmp_path: Path) -> None:
    row = INSTRUCTION_ROW | {"history": [["a?", "b"], ["c?", "d"]], "system": "be"}
    (read_row,) = read_rows(write_lines(tmp_path / "rows.jsonl", row)).train
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
        read_rows(write_lines(tmp_path / "rows.jsonl", INSTRUCTION_ROW | {"history": [["a?"]]}))


def test_prompts_that_end_in_white_space_and_repeated_rows_give_a_warning(
    tmp_path: Path,
) -> None:
    path, held_out = (
        write_lines(
            tmp_path / f"{name}.jsonl",
            *({"prompt": f"q{i} ", "completion": "a", "id": f"{name}{i}"} for i in "123"),
        )
        for name in ("rows", "held_out")
    )
    rows = read_rows(path, eval_path=held_out)
    assert "3 of 3 prompts end in white space" in rows.warnings[0]
    assert rows.warnings[1] == "3 of 3 held-out rows are training rows, too"


def test_rows_have_line_numbers_and_can_be_removed_later(tmp_path: Path) -> None:
    rows = read_rows(write_lines(tmp_path / "rows.jsonl", *({"text": str(i)} for i in range(3))))
    second = location_of(rows.train[1])
    assert second.endswith("rows.jsonl:2")
    remaining = rows.without({second: f"{second}: refused"})
    assert [row["text"] for row in remaining.train] == ["0", "2"]
    assert remaining.skipped == (f"{second}: refused",)
