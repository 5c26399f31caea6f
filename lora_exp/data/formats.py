"""The formats of rows: which format a row has, and its conversion.

Of the fields by which formats are recognised, a row keeps only those of its own format; all other
columns are kept. Knows nothing of files or tokens; needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lora_exp.data.questions import ANSWERED, asked_in, history_in, names_in, question_in
from lora_exp.data.turns import (
    SYSTEM,
    FieldError,
    Row,
    system_column,
    text_in,
    tools_in,
    turns_in,
    with_system,
)
from lora_exp.errors import DataError


class EmptyAnswer(FieldError):
    """An answer without text, from which nothing can be learnt."""


def _from_text(row: Row) -> Row:
    if not text_in(row, "text").strip():
        raise EmptyAnswer("field 'text' is empty")
    return row


def _from_prompt_completion(row: Row) -> Row:
    if isinstance(row.get("prompt"), list):
        prompt, completion = turns_in(row, "prompt"), turns_in(row, "completion")
        turns = with_system(uncounted(prompt) + _with_answer(completion, "completion"), row)
        return _without(row, "prompt", "completion", *SYSTEM) | {"messages": turns}
    text_in(row, "prompt")
    if not text_in(row, "completion").strip():
        raise EmptyAnswer("field 'completion' is empty")
    return row


def _from_alpaca(row: Row) -> Row:
    names = names_in(row)
    turns = [*history_in(row), question_in(row, names)]
    turns.append({"role": "assistant", "content": text_in(row, names.answer)})
    messages = with_system(_with_answer(turns, names.answer), row)
    return _without(row, *names.columns, *SYSTEM, "history") | {"messages": messages}


def _from_messages(row: Row, field: str = "messages") -> Row:
    turns = with_system(_with_answer(turns_in(row, field), field), row)
    return _without(row, field, *SYSTEM) | {"messages": turns}


def _from_sharegpt(row: Row) -> Row:
    return _from_messages(row, "conversations")


def uncounted(prompt: list[Row]) -> list[Row]:
    """Return the turns of a prompt, of which none counts in the loss."""
    return [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]


def _with_answer(turns: list[Row], field: str) -> list[Row]:
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise FieldError(f"{field!r} has no assistant turn, so nothing to learn")
    if not any(turn.get("weight", 1) for turn in answers):
        raise FieldError(f"each assistant turn of {field!r} has weight 0, so nothing to learn")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in answers):
        raise EmptyAnswer(f"the answer in {field!r} is empty")
    return turns


def _from_preference(row: Row) -> Row:
    """Convert a pair of answers; if there is no prompt, it is the beginning that both share."""
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise FieldError("one of 'chosen' and 'rejected' is a text, the other a list of turns")
    prompt = _text_or_turns(row, "prompt") if row.get("prompt") else None
    # whether the turns of the prompt stand in both answers
    is_whole = isinstance(chosen, list) and chosen[0]["role"] != "assistant"
    if prompt is None and not is_whole:
        prompt = asked_in(row)
    if prompt is None or is_whole:
        shared_length = _shared_text if isinstance(chosen, str) else _shared_turns
        length = shared_length(chosen, rejected)
        shared, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        prompt = _longer(prompt, shared) if isinstance(prompt, list) else shared
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
    return _with_prompt(row, prompt) | {"chosen": chosen, "rejected": rejected}


def _longer(prompt: list[Row], shared: list[Row]) -> list[Row]:
    """Return the longer of a prompt and the turns with which both answers begin.

    Raises:
        FieldError: neither contains the other.
    """
    contents, shared_contents = (
        [(turn["role"], turn["content"].strip()) for turn in turns] for turns in (prompt, shared)
    )
    starts = range(len(shared) - len(prompt) + 1)
    if any(shared_contents[i : i + len(prompt)] == contents for i in starts):
        return shared
    if contents[len(prompt) - len(shared) :] == shared_contents:
        return prompt
    raise FieldError("field 'prompt' is another chat than that with which both answers begin")


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shared_text(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts, up to its last white space."""
    end = common_prefix(a, b)
    return max((i + 1 for i in range(end) if a[i].isspace()), default=0)


def _shared_turns(a: list[Row], b: list[Row]) -> int:
    """Return the length of the common prefix of two chats without their last turns, the answers."""
    return common_prefix(a[:-1], b[:-1])


def _from_unpaired_preference(row: Row) -> Row:
    label = LABELS.get(str(row.get("label")).lower())
    if label is None:
        raise FieldError(f"field 'label' is {json.dumps(row.get('label'))}, not true or false")
    prompt, completion = _text_or_turns(row, "prompt"), _answer(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise FieldError("one of 'prompt' and 'completion' is a text, the other a list of turns")
    return _with_prompt(row, prompt) | {"completion": completion, "label": label}


def _from_prompt(row: Row) -> Row:
    return _with_prompt(row, _text_or_turns(row, "prompt"))


def _with_prompt(row: Row, prompt: Any) -> Row:
    """Return a row with its prompt, beginning with the system prompt of a column, if any."""
    if isinstance(prompt, list):
        return _without(row, *SYSTEM) | {"prompt": with_system(prompt, row)}
    return row | {"prompt": prompt}


def _text_or_turns(row: Row, field: str) -> Any:
    """Return a field's text, which must not be empty, or its turns."""
    if isinstance(row.get(field), list):
        return turns_in(row, field)
    if not text_in(row, field):
        raise FieldError(f"field {field!r} is empty")
    return row[field]


def _answer(row: Row, field: str) -> Any:
    """Return an answer: its text, or its turns, of which the last is the assistant's."""
    if isinstance(row.get(field), list):
        turns = turns_in(row, field)
        if turns[-1]["role"] != "assistant":
            raise FieldError(f"the last turn of {field!r} is not the assistant's")
        if not turns[-1]["content"].strip() and not turns[-1].get("tool_calls"):
            raise EmptyAnswer(f"the answer in {field!r} is empty")
        return turns
    if not text_in(row, field).strip():
        raise EmptyAnswer(f"field {field!r} is empty")
    return row[field]


def _without(row: Row, *fields: str) -> Row:
    return {key: value for key, value in row.items() if key not in fields}


# a row has the first format whose fields it has
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
    "alpaca": ANSWERED,
    "prompt_completion": [{"prompt", "completion"}],
    "text": [{"text"}],
    "prompt": [{"prompt"}],
}
# as tables write true and false
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# what goes to a model beside the text, as TRL and data sets of the Hub name it
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
# fields that later stages read, and which of them a row of each format keeps
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
    """Return a row's format: the first of `FORMATS` whose fields the row has.

    Raises:
        DataError: the fields belong to no known format.
    """
    for format, choices in FIELDS.items():
        fields = next((fields for fields in choices if fields <= row.keys()), None)
        if fields is None or ("label" in fields and not isinstance(row["label"], bool)):
            continue
        if format == "alpaca" and "prompt" in row and "instruction" not in row:
            continue  # a prompt with its known answer, for algorithms that answer prompts
        return format
    formats = "; ".join(
        f"{name}: {' or '.join(', '.join(sorted(fields)) for fields in choices)}"
        for name, choices in FIELDS.items()
    )
    raise DataError(
        f"{where}: fields {sorted(row)} are of no known format ({formats}); data.columns says which"
        " column is which, as in data.columns={prompt: ask, completion: reply}"
    )


def read_as(format: str, row: Row, as_chat: bool = False) -> Row:
    """Convert a row to the shape of its format, without the fields of other formats.

    Args:
        format: one of `FORMATS`.
        row: as it was read.
        as_chat: whether plain texts of prompts and answers become turns.

    Raises:
        FieldError: a field that cannot be used, or images and sounds, which are not trained on.
        EmptyAnswer: there is nothing to learn.
    """
    if carried := next((name for name in NOT_TEXT if row.get(name)), None):
        text = f"field {carried!r} is not empty; only text can be trained on"
        raise FieldError(f"{text}, so leave out the row or the column")
    shaped = FORMATS[format](row)
    unused = READ - KEPT[format] | ({"label"} - KEPT[format] if format != "prompt" else set())
    shaped = _without(shaped, *unused, "tools")
    tools = tools_in(row)
    shaped |= {"tools": tools} if tools else {}
    shaped = _as_chat(shaped) if as_chat else shaped
    if isinstance(shaped.get("prompt"), str) and (column := system_column(shaped)):
        text = f"field {column!r} is a system prompt, and the prompt is plain text, not a chat"
        raise FieldError(f"{text}; data.as_chat=true makes both turns of a chat")
    return shaped


def _as_chat(row: Row) -> Row:
    if not isinstance(row.get("prompt"), str):
        return row
    turns = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    turns["prompt"] = with_system(turns["prompt"], row)
    for field in row.keys() & {"completion", "chosen", "rejected"}:
        turns[field] = [{"role": "assistant", "content": row[field]}]
    others = _without(row, *turns, *SYSTEM)
    if "completion" in turns and "label" not in row:
        return others | {"messages": turns["prompt"] + turns["completion"]}
    return others | turns
