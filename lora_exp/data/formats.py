"""The formats that rows come in, and the shapes that algorithms learn from.

A shape is what a row is after reading, with whatever other columns it came with; a text is a string
or, in chats, a list of turns:

completion            `messages`; or `prompt` and `completion`; or `text`
preference            `prompt`, `chosen`, `rejected`
unpaired_preference   `prompt`, `completion`, `label` (true: wanted)
prompt                `prompt`, and `answer` where it is known

Knows nothing of files or tokens; needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lora_exp.errors import DataError

Row = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool"}


class FieldError(Exception):
    """A field that cannot be used; the reader adds file and line."""


def _text(row: Row, field: str) -> str:
    if field not in row:
        raise FieldError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise FieldError(f"field {field!r} is {json.dumps(value)[:40]}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise FieldError(f"field {field!r} holds half a surrogate pair, which is no text") from None
    return value


def _from_text(row: Row) -> Row:
    if not _text(row, "text"):
        raise FieldError("field 'text' is empty")
    return row


def _from_prompt_completion(row: Row) -> Row:
    if isinstance(row.get("prompt"), list):
        prompt, completion = _turns(row, "prompt"), _turns(row, "completion")
        rest = {key: row[key] for key in row.keys() - {"prompt", "completion"}}
        return rest | {"messages": _answered(prompt + completion, "completion")}
    _text(row, "prompt")
    if not _text(row, "completion"):
        raise FieldError("field 'completion' is empty")
    return row


def _from_alpaca(row: Row) -> Row:
    question = _text(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row, "input")
    answer = _text(row, "output")
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rest = {key: row[key] for key in row.keys() - {"instruction", "input", "output", "system"}}
    return rest | {"messages": [*system, *turns]}


def _from_messages(row: Row) -> Row:
    return row | {"messages": _answered(_turns(row, "messages"), "messages")}


def _from_sharegpt(row: Row) -> Row:
    turns = _turns(row, "conversations", role="from", content="value")
    rest = {key: row[key] for key in row.keys() - {"conversations"}}
    return rest | {"messages": _answered(turns, "conversations")}


def _turns(row: Row, field: str, role: str = "role", content: str = "content") -> list[Row]:
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise FieldError(f"field {field!r} is not a list of turns")
    converted = []
    for number, turn in enumerate(turns):
        place = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise FieldError(f"{place} is not an object with {role!r} and {content!r}")
        speaker = turn.get(role)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise FieldError(f"{place}.{role} is {speaker!r}, none of {', '.join(sorted(ROLES))}")
        rest = {key: turn[key] for key in turn.keys() - {role, content}}  # tool calls and the like
        if turn.get("tool_calls") and not turn.get(content):
            turn = turn | {content: ""}
        try:
            said = _text(turn, content)
        except FieldError as error:
            raise FieldError(f"{place}: {error}") from None
        converted.append(rest | {"role": ROLES[speaker], "content": said})
    return converted


def _answered(turns: list[Row], field: str) -> list[Row]:
    if not any(turn["role"] == "assistant" for turn in turns):
        raise FieldError(f"{field!r} has no assistant turn, so nothing to learn")
    return turns


def _from_preference(row: Row) -> Row:
    """Read a pair of answers; where the prompt is not given, it is what both begin with."""
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise FieldError("one of 'chosen' and 'rejected' is a text, the other a list of turns")
    prompt = _said(row, "prompt") if row.get("prompt") else None
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
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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
    prompt, completion = _said(row, "prompt"), _said(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise FieldError("one of 'prompt' and 'completion' is a text, the other a list of turns")
    return row | {"prompt": prompt, "completion": completion}


def _from_prompt(row: Row) -> Row:
    return row | {"prompt": _said(row, "prompt")}


def _said(row: Row, field: str) -> Any:
    """Return a text that is not empty, or checked turns."""
    if isinstance(row.get(field), list):
        return _turns(row, field)
    if not _text(row, field):
        raise FieldError(f"field {field!r} is empty")
    return row[field]


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
FIELDS: dict[str, set[str]] = {
    "preference": {"chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
    "prompt": {"prompt"},
}
SHAPES: dict[str, set[str]] = {
    "completion": {"messages", "text", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
    "prompt": {"prompt"},
}


def detect(row: Row, where: str) -> str:
    """Tell the format by a row's fields.

    Raises:
        DataError: the fields belong to no known format.
    """
    for format, fields in FIELDS.items():
        if fields <= row.keys() and ("label" not in fields or isinstance(row["label"], bool)):
            return format
    known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, fields in FIELDS.items())
    raise DataError(f"{where}: fields {sorted(row)} are of no known format ({known})")


def shape_of(format: str) -> str:
    """Return the shape that rows of a format have."""
    return format if format in SHAPES else "completion"


def reshape(rows: list[Row], format: str, shape: str) -> list[Row]:
    """Bring rows to the shape that an algorithm learns from, where they hold what it needs.

    Pairs become two unpaired rows, or the prompt with its chosen answer; a row with an answer
    becomes a prompt whose `answer` is known.

    Args:
        rows: as read.
        format: from what.
        shape: one of `SHAPES`.

    Raises:
        DataError: what was found and what is needed.
    """
    found = shape_of(format)
    if found == shape:
        return rows
    convert = CONVERSIONS.get((found, shape))
    if convert is None or (shape == "prompt" and format == "text"):
        fields = ", ".join(sorted(rows[0])) if rows else "nothing"
        near = [f for f in FORMATS if (shape_of(f), shape) in CONVERSIONS or shape_of(f) == shape]
        raise DataError(
            f"the algorithm needs rows of shape {shape} ({', '.join(sorted(SHAPES[shape]))}), but"
            f" these were read as {format} with the fields {fields}; formats that would do:"
            f" {', '.join(near)}"
        )
    return [new for row in rows for new in convert(row)]


def _without(row: Row, *fields: str) -> Row:
    return {key: row[key] for key in row.keys() - set(fields)}


def _to_unpaired(row: Row) -> list[Row]:
    rest = _without(row, "chosen", "rejected")
    pair = (("chosen", True), ("rejected", False))
    return [rest | {"completion": row[field], "label": label} for field, label in pair]


def _to_chosen(row: Row) -> list[Row]:
    rest = _without(row, "prompt", "chosen", "rejected")
    if isinstance(row["chosen"], list):
        return [rest | {"messages": row["prompt"] + row["chosen"]}]
    return [rest | {"prompt": row["prompt"], "completion": row["chosen"]}]


def _to_prompt(row: Row) -> list[Row]:
    if "chosen" in row:
        (row,) = _to_chosen(row)
    if "messages" not in row:
        answer = row.get("answer", row["completion"])
        return [_without(row, "completion") | {"prompt": row["prompt"], "answer": answer}]
    *asked, last = row["messages"]
    if last["role"] != "assistant":
        asked, last = row["messages"], {"content": None}
    rest = _without(row, "messages")
    return [rest | {"prompt": asked, "answer": rest.get("answer", last["content"])}]


CONVERSIONS: dict[tuple[str, str], Callable[[Row], list[Row]]] = {
    ("preference", "unpaired_preference"): _to_unpaired,
    ("preference", "completion"): _to_chosen,
    ("preference", "prompt"): _to_prompt,
    ("completion", "prompt"): _to_prompt,
}
