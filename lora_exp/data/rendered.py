"""A row as text: where its answers stand in it, and what it asks.

Knows no token ids; `tokens` carries the spans to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from lora_exp.data.formats import Row, common_prefix
from lora_exp.data.template import render_chat
from lora_exp.errors import DataError


def rendered(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Write a row as text, with the character spans that a completion-only loss counts.

    Raises:
        DataError: the chat template refuses the row, or does not show an assistant turn.
    """
    try:
        return _render(row, tokenizer)
    except TemplateError as error:
        said = json.dumps(row, default=str)[:80]
        raise DataError(f"the chat template refuses a row: {error}; the row: {said}") from error


def _render(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    end = tokenizer.eos_token or ""
    if "text" in row:
        text = row["text"] if row["text"].endswith(end) else row["text"] + end
        return text, [(0, len(text))]
    if "prompt" in row:
        text = row["prompt"] + row["completion"]
        text = text if text.endswith(end) else text + end
        return text, [(len(row["prompt"]), len(text))]
    return _answers(row, tokenizer)


def _answers(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat and find its assistant turns, each from its opening to its end token.

    A turn's end is where the chat so far and the whole chat part. Templates that rewrite earlier
    turns (reasoning models drop their thoughts) part before the answer: then its text is looked up.

    Raises:
        DataError: an assistant turn cannot be found in the rendered chat.
    """
    turns, tools = row["messages"], row.get("tools")
    whole = render_chat(turns, tokenizer, tools)
    spans, seen = [], 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = render_chat(turns[:i], tokenizer, tools, answer=True) if i else ""
        answered = render_chat(turns[: i + 1], tokenizer, tools)
        start = max(seen, common_prefix(asked, whole))
        stop = common_prefix(answered, whole)
        text = turn["content"].rpartition("</think>")[2].strip()
        found = whole.find(text, start) if text else start
        if found < 0 and stop <= start:
            raise DataError(f"the chat template does not show assistant turn {i}: {text[:60]!r}")
        end = found + len(text) if found >= 0 else stop
        if not asked:
            start = end - len(text)  # what stands before the first turn is the template's
        if stop < end or answered[stop:].strip():
            stop = _end_of_turn(whole, end, tokenizer)
        spans.append((start, stop))
        seen = stop
    return whole, spans


def _end_of_turn(whole: str, end: int, tokenizer: Any) -> int:
    """Return where the special token that directly follows an answer ends, or the answer itself."""
    rest = whole[end:]
    space = len(rest) - len(rest.lstrip())
    for token in tokenizer.all_special_tokens:
        if token and rest.lstrip().startswith(token):
            return end + space + len(token)
    return end


@dataclass(frozen=True)
class Prompt:
    """What a row asks, as text, and the known answer as greedy decoding would write it."""

    text: str
    answer: str | None
    chat: bool  # the chat template wrote the special tokens, the tokenizer must not


def prompt_of(row: Row, tokenizer: Any) -> Prompt | None:
    """Split a row into prompt and known answer; None where nothing is asked, or answered badly.

    The answer of a chat is what the template makes of it, so that it compares with what a model
    trained on that template says.
    """
    if "messages" in row:
        if row["messages"][-1]["role"] != "assistant" or not row["messages"][1:]:
            return None
        whole, spans = _answers(row, tokenizer)
        start, stop = spans[-1]
        return Prompt(whole[:start], _decoded(whole[start:stop], tokenizer), chat=True)
    if "prompt" not in row or row.get("label") is False:
        return None
    known = row.get("chosen", row.get("completion", row.get("answer")))
    known = known[-1]["content"] if isinstance(known, list) else known
    if isinstance(row["prompt"], str):
        return Prompt(row["prompt"], known, chat=False)
    text = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
    return Prompt(text, _decoded(known, tokenizer) if known is not None else None, chat=True)


def _decoded(text: str, tokenizer: Any) -> str:
    """Return a text as a model's answer would come back: without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded
