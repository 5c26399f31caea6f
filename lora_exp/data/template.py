"""Chat templates: turns to text, with a time limit and a fixed date."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, DataError, LoraExpError
from lora_exp.files.paths import asset

SECONDS = 3.0  # the limit for one row, of the processor's time: others may keep it busy
_is_handled = False  # whether alarms come to `_on_alarm`
SHIPPED = {"chatml": "pkg://lora_exp/assets/chatml.jinja"}  # name -> file
TURN_END = "<|im_end|>"  # ChatML's
MARK = "7051846925306172"  # digits: neither trimming, case, JSON nor HTML changes them


@dataclass(frozen=True)
class Form:
    """The form of turns that a template takes."""

    parts: bool = False  # content is a list of parts, not a text
    arguments_as_text: bool = False  # a call's arguments are JSON text, not an object


_forms: dict[str, Form] = {}  # by template


def form_of(tokenizer: Any) -> Form:
    """Render a test chat and return the form of turns that a tokenizer's chat template takes."""
    template = str(tokenizer.chat_template)
    if template not in _forms:
        _forms[template] = Form(_takes_parts(tokenizer), _takes_text(tokenizer))
    return _forms[template]


def _takes_parts(tokenizer: Any) -> bool:
    text, parts = ([{"role": "user", "content": c}] for c in (MARK, _parts(MARK)))
    return MARK not in _render_or_empty(text, tokenizer) and MARK in _render_or_empty(
        parts, tokenizer
    )


def _takes_text(tokenizer: Any) -> bool:
    """Return whether arguments must be text: the template writes them as they are, or fails."""
    arguments = {"key": MARK}

    def rendered_call(arguments: Any) -> str:
        function = {"name": "call", "arguments": arguments}
        call = {"type": "function", "id": "123456789", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return _render_or_empty([{"role": "user", "content": "x"}, answer], tokenizer)

    text = rendered_call(arguments)
    if MARK in text and str(arguments) not in text:
        return False
    return MARK in rendered_call(json.dumps(arguments))


def _render_or_empty(turns: list[Any], tokenizer: Any) -> str:
    try:
        return _rendered(turns, tokenizer, None, answer=False)
    except DataError:
        return ""


def render_chat(
    turns: Iterable[Row], tokenizer: Any, tools: Any = None, answer: bool = False
) -> str:
    """Render turns with the chat template; with `answer` the text ends where the answer begins.

    Raises:
        DataError: the template refuses the turns.
        ConfigError: it does not end in time.
    """
    return _rendered(to_form(turns, tokenizer), tokenizer, tools, answer)


def to_form(turns: Iterable[Row], tokenizer: Any) -> list[Row]:
    """Return turns in the form that the template takes, without `weight`."""
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
    except Exception as error:  # a template can raise any error
        raise DataError(f"the chat template refuses it: {error or type(error).__name__}") from error
    return text


@contextmanager
def in_time() -> Iterator[None]:
    """Stop a template that does not end: Jinja's sandbox limits ranges, but not nested loops.

    Works only in the main thread, which alone receives signals.

    Raises:
        ConfigError: the time is over.
    """
    if not _has_alarms():
        yield
        return
    with handled_alarms():
        # again and again: an error that is raised within a tracer or a destructor is lost
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS / 10)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def handled_alarms() -> Iterator[None]:
    """Set the handler of `in_time` once for many renderings: it takes longer than the timer."""
    global _is_handled
    if _is_handled or not _has_alarms():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _on_alarm)
    _is_handled = True
    try:
        yield
    finally:
        _is_handled = False
        signal.signal(signal.SIGVTALRM, previous)


def _on_alarm(*_: Any) -> None:
    text = f"the chat template does not end within {SECONDS:g} s; give another"
    raise ConfigError([("data.chat_template", text)])  # not the fault of a row


def _has_alarms() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGVTALRM")


def template_file(name: str) -> Path:
    """Return the file of a shipped template, or of the path itself."""
    return asset(SHIPPED.get(name, name))


def prepare(tokenizer: Any, template: str | None, day: date) -> None:
    """Set a tokenizer's chat template, if one is given, and a day that it uses for today.

    So a run and its resumes render the same text on every day. Our ChatML ends turns with the EOS
    token where its own is none of the tokenizer's: several tokens would never end an answer.

    Raises:
        ConfigError: the template computes the format of the date.
    """
    is_chatml = template == template_file("chatml").read_text(encoding="utf-8")
    if template is not None and is_chatml and TURN_END not in tokenizer.get_vocab():
        template = template.replace(f"'{TURN_END}'", "eos_token")
    if template is not None:
        tokenizer.chat_template = template
    if "strftime_now" in str(tokenizer.chat_template):
        dated = _dated(tokenizer.chat_template, day)
        apply = partial(type(tokenizer).apply_chat_template, tokenizer, chat_template=dated)
        tokenizer.apply_chat_template = apply


def _dated(template: str, day: date) -> str:
    """Return a template with `strftime_now` calls replaced by a day.

    Transformers does not let us pass another function to templates.
    """
    text = CALL.sub(lambda call: json.dumps(day.strftime(call["format"])), template)
    if "strftime_now(" in text:
        fault = "writes today's date in a form that it computes, so runs cannot be repeated; give a"
        raise ConfigError([("data.chat_template", f"{fault} file with a date, or without")])
    return text


CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def template_hash(tokenizer: Any) -> str | None:
    """Return the hash of a tokenizer's template, in which no day is fixed; None: it has none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def template_of(tokenizer: Any) -> str | None:
    """Return the template with which a tokenizer renders: its own, or the one with a fixed day."""
    dated = getattr(tokenizer.apply_chat_template, "keywords", {})
    template: str | None = dated.get("chat_template", tokenizer.chat_template)
    return template


def turn_end(tokenizer: Any) -> str | None:
    """Return the special token with which the chat template ends an answer; None: it has none.

    In GLM's templates this is the token that opens the next turn.
    """
    key = str(tokenizer.chat_template), tokenizer.bos_token
    if key not in _turn_ends:
        _turn_ends[key] = _turn_end(tokenizer) if tokenizer.chat_template else None
    return _turn_ends[key]


_turn_ends: dict[tuple[str, str | None], str | None] = {}  # by template and BOS token


def _turn_end(tokenizer: Any) -> str | None:
    question, answer_turn = {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}
    for turns in ([question, answer_turn], [question, answer_turn, question]):
        try:
            text = _render_or_empty(to_form(turns, tokenizer), tokenizer)
        except ConfigError:  # it does not end; whoever renders with it gets the error
            return None
        rest = text.partition(MARK)[2].lstrip()
        end = special_tokens(tokenizer).match(rest)
        if end and end.group() != tokenizer.bos_token:
            return end.group()
    return None


_specials: WeakKeyDictionary[Any, tuple[int, re.Pattern[str]]] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of all added and special tokens: templates separate turns with them."""
    cached = _specials.get(tokenizer)
    if cached is None or cached[0] != len(tokenizer):
        tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"  # matches nothing
        cached = _specials[tokenizer] = len(tokenizer), re.compile(pattern)
    return cached[1]
