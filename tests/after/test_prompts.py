"""Prompts of rows of every format; a row without one is an error with file and line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lora_exp.after.prompts import prompts_of, read
from lora_exp.errors import DataError
from tests.after.test_completion import write_rows

TURNS = [{"role": "user", "content": "hi"}]
ANSWER = [{"role": "assistant", "content": "ho"}]
CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "as_chat", "text"),
    [
        ({"messages": TURNS + ANSWER}, False, CHAT),
        ({"messages": TURNS}, False, CHAT),
        ({"messages": [*TURNS, *ANSWER, *TURNS]}, False, f"{CHAT}ho<|im_end|>\n{CHAT}"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
         False, CHAT),
        ({"instruction": "hi", "output": "ho"}, False, CHAT),
        ({"prompt": TURNS, "chosen": "ho", "rejected": "hu"}, False, CHAT),
        ({"prompt": TURNS, "completion": ANSWER}, False, CHAT),
        ({"prompt": "hi"}, True, CHAT),
        ({"prompt": "hi", "completion": "ho", "label": False}, True, CHAT),
        ({"prompt": "hi", "completion": "ho", "label": False}, False, "hi"),
        ({"prompt": "hi"}, False, "hi"),
    ],
)  # fmt: skip
def test_a_row_of_every_format_has_a_prompt(
    base: Any, tmp_path: Path, row: dict[str, Any], as_chat: bool, text: str
) -> None:
    rows = read(write_rows(tmp_path / "rows.jsonl", {"prompt": "first"}, row), as_chat)
    assert rows[1].original == row
    assert rows[1].where == f"{tmp_path}/rows.jsonl:2"
    prompt = prompts_of(rows, base.tokenizer)[1]
    assert prompt.text.endswith(text)
    assert prompt.chat == (text != "hi")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS + ANSWER}, "ho"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
         "ho"),
        ({"instruction": "hi", "input": "you", "response": "ho"}, "ho"),
        ({"prompt": "hi", "completion": "ho"}, "ho"),
        ({"prompt": TURNS, "completion": ANSWER}, ANSWER),
        ({"prompt": "hi", "answer": "ho"}, "ho"),
        ({"prompt": "hi", "chosen": "ho", "rejected": "hu"}, "ho"),
        ({"chosen": TURNS + ANSWER, "rejected": [*TURNS, {"role": "gpt", "content": "hu"}]}, "ho"),
        ({"messages": [*TURNS, *ANSWER, *TURNS]}, None),
        ({"prompt": "hi"}, None),
    ],
)  # fmt: skip
def test_the_known_answer_of_a_row_of_every_format_is_expected(
    tmp_path: Path, row: dict[str, Any], expected: Any
) -> None:
    (prompt_row,) = read(write_rows(tmp_path / "rows.jsonl", row))
    assert prompt_row.expected == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "rows.jsonl:1: has no prompt; give a prompt, or turns that end with"),
        ({"messages": ANSWER}, "rows.jsonl:1: has no prompt"),
        ({"messages": [{"role": "pope", "content": "?"}]}, "'pope', none of"),
        ({"question": "?"}, "rows.jsonl:1: fields .* are of no known format"),
    ],
)
def test_a_row_without_a_prompt_is_an_error(
    base: Any, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prompts_of(read(write_rows(tmp_path / "rows.jsonl", row)), base.tokenizer)


def test_a_chat_needs_a_template_that_accepts_it(base: Any, tmp_path: Path) -> None:
    rows = read(write_rows(tmp_path / "rows.jsonl", {"prompt": "text"}, {"prompt": TURNS}))
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"rows.jsonl:2: a chat, but the tokenizer has no chat"):
        prompts_of(rows, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template refuses it: no system"):
        prompts_of(rows, tokenizer)
