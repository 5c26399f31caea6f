"""The formats that rows come in: which one a row has, and what it becomes.

Of the fields that tell formats apart a row keeps those of its own; the other columns are carried
along. Knows nothing of files or tokens; needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lora_exp.data.turns import FieldError, Row, text_in, tools_in, turns_in, with_system
from lora_exp.errors import DataError


class EmptyAnswer(FieldError):
    """An answer without text, from which nothing can be learnt."""


# question, what it is about, answer: as the columns of well-known data sets are called
QUESTIONS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "context", "output"),
    ("instruction", "input", "response"),
    ("question", "", "answer"),
    ("query", "", "response"),
    ("input", "", "output"),
)


def _from_text(row: Row) -> Row:
    if not text_in(row, "text"):
        raise EmptyAnswer("field 'text' is empty")
    return row


def _from_prompt_completion(row: Row) -> Row:
    if isinstance(row.get("prompt"), list):
        prompt, completion = turns_in(row, "prompt"), turns_in(row, "completion")
        turns = with_system(_answered(prompt + completion, "completion"), row)
        return _without(row, "prompt", "completion", "system") | {"messages": turns}
    text_in(row, "prompt")
    if not text_in(row, "completion"):
        raise EmptyAnswer("field 'completion' is empty")
    return row


def _from_alpaca(row: Row) -> Row:
    names = next((n for n in QUESTIONS if n[0] in row and n[2] in row), QUESTIONS[0])
    question, about, answer = names
    text = text_in(row, question)
    if about and row.get(about):
        text += "\n\n" + text_in(row, about)
    turns = [*_history(row), {"role": "user", "content": text}]
    turns.append({"role": "assistant", "content": text_in(row, answer)})
    messages = with_system(_answered(turns, answer), row)
    return _without(row, question, about, answer, "system", "history") | {"messages": messages}


def _history(row: Row) -> list[Row]:
    """Return the earlier turns of an alpaca row: pairs of question and answer."""
    history = row.get("history") or []
    texts = [text for pair in history for text in pair] if isinstance(history, list) else [None]
    if len(texts) != 2 * len(history) or not all(isinstance(text, str) for text in texts):
        raise FieldError("field 'history' is not a list of pairs [question, answer]")
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def _from_messages(row: Row, field: str = "messages") -> Row:
    turns = with_system(_answered(turns_in(row, field), field), row)
    return _without(row, field, "system") | {"messages": turns}


def _from_sharegpt(row: Row) -> Row:
    return _from_messages(row, "conversations")


def _answered(turns: list[Row], field: str) -> list[Row]:
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise FieldError(f"{field!r} has no assistant turn, so nothing to learn")
    if not any(turn.get("weight", 1) for turn in answers):
        raise FieldError(f"each assistant turn of {field!r} has weight 0, so nothing to learn")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in answers):
        raise EmptyAnswer(f"the answer in {field!r} is empty")
    return turns


def _from_preference(row: Row) -> Row:
    """Read a pair of answers; where the prompt is not given, it is what both begin with."""
    chosen, rejected = _text_or_turns(row, "chosen"), _text_or_turns(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise FieldError("one of 'chosen' and 'rejected' is a text, the other a list of turns")
    prompt = _text_or_turns(row, "prompt") if row.get("prompt") else None
    if isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        prompt = None  # the turns of the prompt stand in both answers
    if prompt is None:
        cut = _shared_text if isinstance(chosen, str) else _shared_turns
        length = cut(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    elif isinstance(prompt, str) and isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise FieldError(f"field {field!r} holds nothing beside the prompt")
    if chosen == rejected:
        raise FieldError("'chosen' and 'rejected' are the same")
    if not prompt:
        raise FieldError("field 'prompt' is missing, and the two answers begin with nothing shared")
    return _prompted(row, prompt) | {"chosen": chosen, "rejected": rejected}


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many items two sequences begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shared_text(a: str, b: str) -> int:
    """Return how many characters two texts share at their start, up to a white space."""
    end = common_prefix(a, b)
    return max((i + 1 for i in range(end) if a[i].isspace()), default=0)


def _shared_turns(a: list[Row], b: list[Row]) -> int:
    """Return how many turns two chats share at their start; the last is always an answer."""
    return common_prefix(a[:-1], b[:-1])


def _from_unpaired_preference(row: Row) -> Row:
    if not isinstance(row.get("label"), bool):
        raise FieldError(f"field 'label' is {json.dumps(row.get('label'))}, not true or false")
    prompt, completion = _text_or_turns(row, "prompt"), _text_or_turns(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise FieldError("one of 'prompt' and 'completion' is a text, the other a list of turns")
    return _prompted(row, prompt) | {"completion": completion}


def _from_prompt(row: Row) -> Row:
    return _prompted(row, _text_or_turns(row, "prompt"))


def _prompted(row: Row, prompt: Any) -> Row:
    """Return a row with its prompt, the system prompt of its column `system` at the beginning."""
    if isinstance(prompt, list) and row.get("system"):
        return _without(row, "system") | {"prompt": with_system(prompt, row)}
    return row | {"prompt": prompt}


def _text_or_turns(row: Row, field: str) -> Any:
    """Return a text that is not empty, or checked turns."""
    if isinstance(row.get(field), list):
        return turns_in(row, field)
    if not text_in(row, field):
        empty = FieldError if field == "prompt" else EmptyAnswer
        raise empty(f"field {field!r} is empty")
    return row[field]


def _without(row: Row, *fields: str) -> Row:
    return {key: row[key] for key in row.keys() - set(fields)}


# in the order in which a row's fields are compared with them
FORMATS: dict[str, Callable[[Row], Row]] = {
    "preference": _from_preference,
    "unpaired_preference": _from_unpaired_preference,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "prompt": _from_prompt,
}
FIELDS: dict[str, list[set[str]]] = {
    "preference": [{"chosen", "rejected"}],
    "unpaired_preference": [{"prompt", "completion", "label"}],
    "messages": [{"messages"}],
    "sharegpt": [{"conversations"}],
    "alpaca": [{question, answer} for question, _, answer in QUESTIONS],
    "prompt_completion": [{"prompt", "completion"}],
    "text": [{"text"}],
    "prompt": [{"prompt"}],
}
# what a row of a format may hold of the fields that the later stages read
READ = {"messages", "text", "prompt", "completion", "chosen", "rejected"}
KEPT: dict[str, set[str]] = {
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
    "messages": {"messages"},
    "sharegpt": {"messages"},
    "alpaca": {"messages"},
    "prompt_completion": {"messages", "prompt", "completion"},
    "text": {"text"},
    "prompt": {"prompt", "text"},
}


def detect(row: Row, where: str) -> str:
    """Tell the format by a row's fields: the first of `FORMATS` whose fields are all there.

    Raises:
        DataError: the fields belong to no known format.
    """
    for format, choices in FIELDS.items():
        fields = next((fields for fields in choices if fields <= row.keys()), None)
        if fields is None or ("label" in fields and not isinstance(row["label"], bool)):
            continue
        if format == "alpaca" and "prompt" in row and "instruction" not in row:
            continue  # a prompt beside its answer, for algorithms that answer prompts
        return format
    known = "; ".join(
        f"{name}: {' or '.join(', '.join(sorted(fields)) for fields in choices)}"
        for name, choices in FIELDS.items()
    )
    raise DataError(
        f"{where}: fields {sorted(row)} are of no known format ({known}); data.columns says which"
        " column is which, as in data.columns={prompt: ask, completion: reply}"
    )


def read_as(format: str, row: Row, as_chat: bool = False) -> Row:
    """Bring a row of a format to its shape, without the fields of other formats.

    Args:
        format: one of `FORMATS`.
        row: as it was written.
        as_chat: plain texts of prompts and answers become turns.

    Raises:
        FieldError: a field that cannot be used.
    """
    shaped = FORMATS[format](row)
    spare = READ - KEPT[format] | ({"label"} - KEPT[format] if format != "prompt" else set())
    shaped = _without(shaped, *spare, "tools")
    tools = tools_in(row)
    shaped |= {"tools": tools} if tools else {}
    return _as_chat(shaped) if as_chat else shaped


def _as_chat(row: Row) -> Row:
    if not isinstance(row.get("prompt"), str):
        return row
    turns = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    turns["prompt"] = with_system(turns["prompt"], row)
    for field in row.keys() & {"completion", "chosen", "rejected"}:
        turns[field] = [{"role": "assistant", "content": row[field]}]
    rest = _without(row, *turns, "system")
    if "completion" in turns and "label" not in row:
        return rest | {"messages": turns["prompt"] + turns["completion"]}
    return rest | turns
