"""Chat templates: turns to text, in the form that a template takes, in time, on a fixed date."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, DataError, LoraExpError

SECONDS = 3.0  # for one row
MARK = "7051846925306172"  # digits: neither trimming, case, JSON nor HTML changes them


@dataclass(frozen=True)
class Form:
    """What a template makes text of."""

    parts: bool = False  # content as a list of parts, not as a text
    arguments_as_text: bool = False  # a call's arguments as JSON text, not as an object


_forms: dict[str, Form] = {}  # by template


def form_of(tokenizer: Any) -> Form:
    """Find out by rendering what a tokenizer's chat template takes."""
    template = str(tokenizer.chat_template)
    if template not in _forms:
        _forms[template] = Form(_takes_parts(tokenizer), _takes_text(tokenizer))
    return _forms[template]


def _takes_parts(tokenizer: Any) -> bool:
    text, parts = ([{"role": "user", "content": c}] for c in (MARK, _parts(MARK)))
    return MARK not in _tried(text, tokenizer) and MARK in _tried(parts, tokenizer)


def _takes_text(tokenizer: Any) -> bool:
    """Tell by a call whether its arguments must be text: written as they are, or refused else."""
    arguments = {"key": MARK}

    def written(arguments: Any) -> str:
        function = {"name": "call", "arguments": arguments}
        call = {"type": "function", "id": "123456789", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return _tried([{"role": "user", "content": "x"}, answer], tokenizer)

    text = written(arguments)
    if MARK in text and str(arguments) not in text:
        return False
    return MARK in written(json.dumps(arguments))


def _tried(turns: list[Any], tokenizer: Any) -> str:
    try:
        return _rendered(turns, tokenizer, None, answer=False)
    except DataError:
        return ""


def render_chat(
    turns: Iterable[Row], tokenizer: Any, tools: Any = None, answer: bool = False
) -> str:
    """Write turns with the chat template; `answer` opens the assistant's turn.

    Raises:
        DataError: the template refuses the turns.
        ConfigError: it does not end.
    """
    return _rendered(as_taken(turns, tokenizer), tokenizer, tools, answer)


def as_taken(turns: Iterable[Row], tokenizer: Any) -> list[Row]:
    """Return turns in the form that the template takes, without what is not for it."""
    form = form_of(tokenizer)
    return [_turn(turn, form) for turn in turns]


def _turn(turn: Row, form: Form) -> Row:
    turn = {key: value for key, value in turn.items() if key != "weight"}
    if form.parts and isinstance(turn.get("content"), str):
        turn["content"] = _parts(turn["content"])
    if form.arguments_as_text and turn.get("tool_calls"):
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def _parts(text: str) -> list[Row]:
    return [{"type": "text", "text": text}]


def _call(call: Row) -> Row:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _rendered(turns: list[Row], tokenizer: Any, tools: Any, answer: bool) -> str:
    try:
        with in_time():
            text: str = tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=answer
            )
    except LoraExpError:
        raise
    except Exception as error:  # a template is a program of others, and raises what it likes
        raise DataError(f"the chat template refuses it: {error or type(error).__name__}") from error
    return text


@contextmanager
def in_time() -> Iterator[None]:
    """Stop a template that loops: Jinja's sandbox limits a range, but not loops in loops.

    Raises:
        ConfigError: it does not end. Only a process's first thread can tell.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> None:
        text = f"the chat template does not end within {SECONDS:g} s; give another"
        raise ConfigError([("data.chat_template", text)])  # no fault of one row

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(tokenizer: Any, template: str | None, day: date) -> None:
    """Give a tokenizer the rows' chat template, if they bring one, and a day instead of today.

    So a run and its resumes render the same text, however long they take.

    Raises:
        ConfigError: the template writes the date in a form that it computes.
    """
    if template is not None:
        tokenizer.chat_template = template
    if "strftime_now" in str(tokenizer.chat_template):
        dated = _dated(tokenizer.chat_template, day)
        apply = partial(type(tokenizer).apply_chat_template, tokenizer, chat_template=dated)
        tokenizer.apply_chat_template = apply


def _dated(template: str, day: date) -> str:
    """Return a template that writes a day where it writes today.

    Transformers hands no function to templates, so the calls are replaced by what they return.
    """
    text = CALL.sub(lambda call: json.dumps(day.strftime(call["format"])), template)
    if "strftime_now(" in text:
        fault = "writes today's date in a form that it computes, so runs cannot be repeated; give a"
        raise ConfigError([("data.chat_template", f"{fault} file with a date, or without")])
    return text


CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def template_of(tokenizer: Any) -> str | None:
    """Return the template that a tokenizer renders with: its own, or that with its day."""
    dated = getattr(tokenizer.apply_chat_template, "keywords", {})
    template: str | None = dated.get("chat_template", tokenizer.chat_template)
    return template


def turn_end(tokenizer: Any) -> str | None:
    """Return the special token with which the chat template ends an answer; None: with none.

    In GLM's templates this is the token that opens the next turn.
    """
    key = str(tokenizer.chat_template), tokenizer.bos_token
    if key not in _turn_ends:
        _turn_ends[key] = _turn_end(tokenizer) if tokenizer.chat_template else None
    return _turn_ends[key]


_turn_ends: dict[tuple[str, str | None], str | None] = {}  # by template and BOS token


def _turn_end(tokenizer: Any) -> str | None:
    asked, answered = {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}
    for turns in ([asked, answered], [asked, answered, asked]):
        rest = _tried(as_taken(turns, tokenizer), tokenizer).partition(MARK)[2].lstrip()
        end = special_tokens(tokenizer).match(rest)
        if end and end.group() != tokenizer.bos_token:
            return end.group()
    return None


_specials: WeakKeyDictionary[Any, tuple[int, re.Pattern[str]]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return what matches the tokens added to a vocabulary: templates write structure in them."""
    known = _specials.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"  # matches nothing
        known = _specials[tokenizer] = len(tokenizer), re.compile(pattern)
    return known[1]
