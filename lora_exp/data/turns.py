"""The turns of a chat: however a row writes them, brought to the form that templates are given.

A turn is `role` (system, user, assistant, tool) and `content`, a text; an assistant's may hold
`tool_calls`, each with its arguments as an object, and `weight` 0, which keeps it out of the loss.
Other fields stay, for the template.
"""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "function_call": "assistant"}
ROLES |= {"system": "system", "developer": "system", "tool": "tool"}
ROLES |= {"function": "tool", "observation": "tool"}


class FieldError(Exception):
    """A field that cannot be used; the reader adds file and line."""


def turns_in(row: Row, field: str) -> list[Row]:
    """Return the turns in a field of a row, those of ShareGPT (`from`, `value`) included.

    Raises:
        FieldError: by turn and field, what cannot be used.
    """
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise FieldError(f"field {field!r} is not a list of turns")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(turns)]


def with_system(turns: list[Row], row: Row) -> list[Row]:
    """Return turns that begin with the text of the row's column `system`, where it has one.

    Raises:
        FieldError: the column is no text, or the turns begin with another system prompt.
    """
    if not row.get("system"):
        return turns
    system = {"role": "system", "content": text_in(row, "system")}
    if turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0]["content"] != system["content"]:
        raise FieldError("field 'system' is another text than the system turn of the chat")
    return turns


def tools_in(row: Row) -> list[Row] | None:
    """Return the tools that a row offers, which many data sets write as JSON text; None: none.

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
    """Return a field that must be text.

    Raises:
        FieldError: it is missing or something else.
    """
    if field not in row:
        raise FieldError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise FieldError(f"field {field!r} is {json.dumps(value, default=str)[:40]}, not text")
    return value


def _turn(turn: Any, place: str) -> Row:
    if not isinstance(turn, dict):
        raise FieldError(f"{place} is not an object with 'role' and 'content'")
    role = "from" if "from" in turn and "role" not in turn else "role"
    content = "value" if "value" in turn and "content" not in turn else "content"
    speaker = turn.get(role)
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise FieldError(f"{place}.{role} is {speaker!r}, none of {', '.join(sorted(ROLES))}")
    used = {role, content, "tool_calls", "function_call", "weight"}
    rest = {key: turn[key] for key in turn.keys() - used}
    if turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise FieldError(f"{place}.weight is {turn['weight']!r}, neither 0 nor 1")
        rest["weight"] = int(turn["weight"])
    calls, text = turn.get("tool_calls") or turn.get("function_call"), turn.get(content)
    if speaker == "function_call":
        calls, text = text, ""
    if calls:
        rest["tool_calls"] = _calls(calls, f"{place}.tool_calls")
        text = text or ""
    if isinstance(text, list):
        text = _joined(text, f"{place}.{content}")
    try:
        text = text_in(turn if text is None else {content: text}, content)
    except FieldError as error:
        raise FieldError(f"{place}: {error}") from None
    return rest | {"role": ROLES[speaker], "content": text}


def _joined(parts: list[Any], place: str) -> str:
    texts = []
    for number, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise FieldError(f"{place}[{number}] is of type {kind!r}; only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, place: str) -> list[Row]:
    calls = _decoded(calls, place)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(_decoded(call, place), f"{place}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, place: str) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{place} has no function name")
    arguments = _decoded(function.get("arguments") or {}, f"{place}.arguments")
    if not isinstance(arguments, dict):
        raise FieldError(f"{place}.arguments is {json.dumps(arguments)[:40]}, not an object")
    outer = {} if function is call else {key: call[key] for key in call.keys() - {"function"}}
    return {"type": "function"} | outer | {"function": function | {"arguments": arguments}}


def _decoded(value: Any, place: str) -> Any:
    """Return what a JSON text says; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise FieldError(f"{place} is a text, but not JSON: {error}") from None
