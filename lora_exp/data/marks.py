"""Marks within turns, by which a turn's place is found in the rendering of a chat."""

from __future__ import annotations

from collections.abc import Callable

from lora_exp.data.template import MARK
from lora_exp.data.turns import Row

# returns a turn with `MARK` in it; None if there is no place for it
Marker = Callable[[Row], Row | None]
THOUGHTS = "</think>"  # templates of reasoning models may drop an answer's text before it


def marked(turns: list[Row], i: int, marker: Marker) -> list[Row] | None:
    """Return turns with a mark in one of them; None if there is no place for it."""
    turn = marker(turns[i])
    return None if turn is None else [*turns[:i], turn, *turns[i + 1 :]]


def in_text(turn: Row) -> Row:
    """Put the mark in the middle of the text: templates may check its beginning and end."""
    text = turn["content"].rpartition(THOUGHTS)[2]
    return _with_mark(turn, len(text) - len(text) // 2)


def before_text(turn: Row) -> Row:
    """Put the mark before the text."""
    return _with_mark(turn, len(turn["content"].rpartition(THOUGHTS)[2].lstrip()))


def _with_mark(turn: Row, characters_left: int) -> Row:
    """Put the mark so that a number of characters of the content follow it."""
    position = len(turn["content"]) - characters_left
    return turn | {"content": turn["content"][:position] + MARK + turn["content"][position:]}


def in_arguments(turn: Row) -> Row | None:
    """Put the mark in the arguments of the last call."""
    if not turn.get("tool_calls"):
        return None
    *calls, last = turn["tool_calls"]
    function = last["function"]
    arguments = dict(function["arguments"]) | {"mark": MARK}
    return turn | {"tool_calls": [*calls, last | {"function": function | {"arguments": arguments}}]}


def in_name(turn: Row, number: int) -> Row:
    """Put the mark in the name of a call."""
    calls = list(turn["tool_calls"])
    function = calls[number]["function"]
    name = function["name"] + MARK
    calls[number] = calls[number] | {"function": function | {"name": name}}
    return turn | {"tool_calls": calls}


MARKERS: tuple[Marker, ...] = (in_text, in_arguments)
