"""Marks within turns: where each is put."""

from __future__ import annotations

from typing import Any

from lora_exp.data.marks import before_text, in_arguments, in_name, in_text, marked
from lora_exp.data.template import MARK

CALLS = [{"function": {"name": name, "arguments": {"a": 1}}} for name in ("f", "g")]


def test_a_mark_is_within_or_before_the_text_that_follows_the_thoughts() -> None:
    turn = {"role": "assistant", "content": "<think>hm</think>\n\nabcd"}
    assert in_text(turn)["content"] == f"<think>hm</think>\n\na{MARK}bcd"
    assert before_text(turn)["content"] == f"<think>hm</think>\n\n{MARK}abcd"


def test_a_mark_in_a_call_leaves_the_others_as_they_are() -> None:
    turn: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": CALLS}
    first, last = in_arguments(turn)["tool_calls"]  # type: ignore[index]
    assert (first, last["function"]["arguments"]) == (CALLS[0], {"a": 1, "mark": MARK})
    first, last = in_name(turn, 0)["tool_calls"]
    assert (first["function"]["name"], last) == (f"f{MARK}", CALLS[1])
    assert marked([{"role": "user", "content": "q"}], 0, in_arguments) is None
