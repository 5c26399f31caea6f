"""Turns: the formats of chats, and what each becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_exp.data.turns import FieldError, tools_in, turns_in, with_system

WEATHER = {"name": "weather", "arguments": {"city": "Kyōto", "days": 2}}
CALL = {"type": "function", "function": WEATHER}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def turn(**fields: Any) -> dict[str, Any]:
    (parsed,) = turns_in({"messages": [fields]}, "messages")
    return parsed


@pytest.mark.parametrize(
    ("fields", "role", "content"),
    [
        ({"role": "user", "content": "q"}, "user", "q"),
        ({"from": "human", "value": "q"}, "user", "q"),
        ({"from": "gpt", "content": "a"}, "assistant", "a"),
        ({"role": "gpt", "value": "a"}, "assistant", "a"),
        ({"role": "developer", "content": "be brief"}, "system", "be brief"),
        ({"from": "observation", "value": "17"}, "tool", "17"),
        ({"role": "function", "content": "17"}, "tool", "17"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, "user", "ab"),
    ],
)
def test_a_turn_is_a_role_and_a_text(fields: dict[str, Any], role: str, content: str) -> None:
    assert turn(**fields) == {"role": role, "content": content}


def with_json_arguments(function: dict[str, Any]) -> dict[str, Any]:
    return function | {"arguments": json.dumps(function["arguments"])}


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
        {"role": "assistant", "tool_calls": [CALL | {"function": with_json_arguments(WEATHER)}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [json.dumps(CALL)]},
        {"role": "assistant", "content": None, "function_call": with_json_arguments(WEATHER)},
        {"from": "function_call", "value": json.dumps(WEATHER)},
    ],
)
def test_every_form_of_a_tool_call_is_decoded_once(fields: dict[str, Any]) -> None:
    assert turn(**fields) == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_turns_may_be_json_text() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]
    parsed = turns_in({"messages": turns}, "messages")
    for value in (json.dumps(turns), [json.dumps(turn) for turn in turns]):
        assert turns_in({"messages": value}, "messages") == parsed
    with pytest.raises(FieldError, match="field 'messages' is a text, but not JSON"):
        turns_in({"messages": "[no"}, "messages")


def test_fields_keep_their_order_and_those_without_a_value_are_left_out() -> None:
    call = {"id": "1", "index": 0, "type": "function", "function": WEATHER | {"strict": True}}
    fields = {"name": "n", "tool_calls": [call | {"x": None}], "refusal": None, "content": None}
    parsed = turn(role="assistant", **fields)
    assert json.dumps(parsed["tool_calls"]) == json.dumps([call])
    assert parsed == {"name": "n", "role": "assistant", "content": "", "tool_calls": [call]}


def test_json_inside_arguments_stays_text() -> None:
    arguments = {"body": json.dumps({"nested": 1})}
    parsed = turn(
        role="assistant", tool_calls=[{"name": "post", "arguments": json.dumps(arguments)}]
    )
    assert parsed["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_weight_keeps_a_turn_out_of_the_loss() -> None:
    assert turn(role="assistant", content="a", weight=0)["weight"] == 0
    assert turn(role="assistant", content="a", weight=1.0)["weight"] == 1
    assert "weight" not in turn(role="assistant", content="a", weight=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "narrator", "content": "x"}, r"messages\[0\]\.role is 'narrator', none of"),
        ({"from": 3, "value": "x"}, r"messages\[0\]\.from is 3"),
        ({"role": "user"}, r"messages\[0\]: field 'content' is missing"),
        ({"role": "user", "content": {"text": "x"}}, r"messages\[0\]: field 'content' is {\"text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
         r"messages\[0\]\.content\[0\] is of type 'image_url'; only text"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight is 0.5, neither 0 nor 1"),
        ({"role": "assistant", "tool_calls": "{oh"}, r"tool_calls is a text, but not JSON"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] has no function"),
        ({"role": "assistant", "tool_calls": [WEATHER | {"arguments": "[1]"}]},
         r"tool_calls\[0\]\.arguments is \[1\], not an object"),
    ],
)  # fmt: skip
def test_a_turn_that_cannot_be_used_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        turn(**fields)


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], json.dumps([json.dumps(TOOL)])]
)
def test_tools_are_objects_or_json_text(tools: Any) -> None:
    assert tools_in({"tools": tools}) == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_an_empty_list_of_tools_is_none(tools: Any) -> None:
    assert tools_in({"tools": tools}) is None


def test_invalid_tools_are_refused() -> None:
    with pytest.raises(FieldError, match="'tools' is not a list of objects"):
        tools_in({"tools": [1]})
    with pytest.raises(FieldError, match="field 'tools' is a text, but not JSON"):
        tools_in({"tools": "weather"})


def test_a_system_column_is_used_unless_it_contradicts_a_system_turn() -> None:
    ask, system = {"role": "user", "content": "q"}, {"role": "system", "content": "be"}
    assert with_system([ask], {"system": "be"}) == [system, ask]
    assert with_system([system, ask], {"system": "be"}) == [system, ask]
    assert with_system([ask], {"system": ""}) == [ask]
    with pytest.raises(FieldError, match="another text than the system turn"):
        with_system([system, ask], {"system": "do"})
    with pytest.raises(FieldError, match="'system' is 3, not text"):
        with_system([ask], {"system": 3})
