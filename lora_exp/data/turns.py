"""The turns of a chat, converted from all common ways of writing them to one.

A turn has `role` (system, user, assistant, tool) and `content`, a text; an assistant's turn may
have `tool_calls`, each with its arguments as an object, and `weight` 0, which excludes it from the
loss. Other fields are kept for the template.
"""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "function_call": "assistant"}
ROLES |= {"system": "system", "developer": "system", "tool": "tool"}
ROLES |= {"function": "tool", "observation": "tool"}
SYSTEM = ("system", "system_prompt")  # columns with a system prompt


class FieldError(Exception):
    """A field cannot be used; `conversion` adds file and line."""


def turns_in(row: Row, field: str) -> list[Row]:
    """Return the turns in a field of a row; ShareGPT's fields `from` and `value` are read, too.

    They may be JSON text, as in the columns of tables whose rows have different fields.

    Raises:
        FieldError: a turn cannot be used; turn and field are named.
    """
    turns = row.get(field)
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":
        turns = _decoded(turns, f"field {field!r}")
    if not isinstance(turns, list) or not turns:
        raise FieldError(f"field {field!r} is not a list of turns")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(turns)]


def with_system(turns: list[Row], row: Row) -> list[Row]:
    """Return turns that begin with the system prompt in a column of the row, if it has one.

    Raises:
        FieldError: the column is no text, or the turns begin with another system prompt.
    """
    if (column := system_column(row)) is None:
        return turns
    system = {"role": "system", "content": text_in(row, column)}
    if turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0]["content"] != system["content"]:
        raise FieldError(f"field {column!r} is another text than the system turn of the chat")
    return turns


def system_column(row: Row) -> str | None:
    """Return the column of a row that has a system prompt; None: there is none."""
    return next((column for column in SYSTEM if row.get(column)), None)


def tools_in(row: Row) -> list[Row] | None:
    """Return the tools of a row, also if they are JSON text; None: it has none.

    Raises:
        FieldError: they are not a list of objects.
    """
    tools = _decoded(row.get("tools") or None, "field 'tools'")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise FieldError("field 'tools' is not a list of objects")
    tools = [_decoded(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise FieldError("field 'tools' is not a list of objects")
    return tools


def text_in(row: Row, field: str) -> str:
    """Return a field, which must be text.

    Raises:
        FieldError: it is missing or something else.
    """
    if field not in row:
        raise FieldError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise FieldError(f"field {field!r} is {json.dumps(value, default=str)[:40]}, not text")
    return value


def _turn(turn: Any, location: str) -> Row:
    if isinstance(turn, str) and turn.lstrip()[:1] == "{":
        turn = _decoded(turn, location)
    if not isinstance(turn, dict):
        raise FieldError(f"{location} is not an object with 'role' and 'content'")
    role = "from" if "from" in turn and "role" not in turn else "role"
    content = "value" if "value" in turn and "content" not in turn else "content"
    role_name = turn.get(role)
    if not isinstance(role_name, str) or role_name not in ROLES:
        raise FieldError(f"{location}.{role} is {role_name!r}, none of {', '.join(sorted(ROLES))}")
    used = {role, content, "tool_calls", "function_call", "weight"}
    rest = {key: value for key, value in turn.items() if key not in used and value is not None}
    if turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise FieldError(f"{location}.weight is {turn['weight']!r}, neither 0 nor 1")
        rest["weight"] = int(turn["weight"])
    calls, text = turn.get("tool_calls") or turn.get("function_call"), turn.get(content)
    if role_name == "function_call":
        calls, text = text, ""
    if calls:
        rest["tool_calls"] = _calls(calls, f"{location}.tool_calls")
        text = text or ""
    if isinstance(text, list):
        text = _joined(text, f"{location}.{content}")
    try:
        text = text_in(turn if text is None else {content: text}, content)
    except FieldError as error:
        raise FieldError(f"{location}: {error}") from None
    return rest | {"role": ROLES[role_name], "content": text}


def _joined(parts: list[Any], location: str) -> str:
    texts = []
    for number, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            part_type = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise FieldError(
                f"{location}[{number}] is of type {part_type!r}; only text can be trained on"
            )
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, location: str) -> list[Row]:
    calls = _decoded(calls, location)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(_decoded(call, location), f"{location}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, location: str) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{location} has no function name")
    arguments = _decoded(function.get("arguments") or {}, f"{location}.arguments")
    if not isinstance(arguments, dict):
        raise FieldError(f"{location}.arguments is {json.dumps(arguments)[:40]}, not an object")
    function = function | {"arguments": arguments}
    if "function" not in call:
        return {"type": "function", "function": function}
    # in the order of the row: templates may write a call as JSON
    others = {key: value for key, value in call.items() if value is not None}
    return others | {"type": call.get("type") or "function", "function": function}


def _decoded(value: Any, location: str) -> Any:
    """Return a value, decoded if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise FieldError(f"{location} is a text, but not JSON: {error}") from None
