"""Rows that ask something: read from files of any format that training takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.data.conversion import convert, validate
from lora_exp.data.reading import files, lines
from lora_exp.data.rendered import Prompt, prompt_of
from lora_exp.data.turns import ROLES, Row
from lora_exp.errors import DataError


@dataclass(frozen=True)
class Asking:
    """A row that asks something."""

    where: str  # file and line
    written: Row  # as it stands there
    row: Row  # in the shape that its format has


def read(path: str | Path, as_chat: bool = False) -> list[Asking]:
    """Read rows, each by its own format; a chat may end with a question.

    Args:
        path: JSON Lines, or a glob.
        as_chat: a `prompt` that is text is a user's turn.

    Raises:
        DataError: by file, line and field, what cannot be used; or there are no rows.
    """
    numbered: list[tuple[str, Any]] = [row for file in files(str(path)) for row in lines(file)]
    if not numbered:
        raise DataError(f"{path}: no rows")
    rows = []
    for where, written in numbered:
        asked = _question(validate(written, where), as_chat)
        read = convert([(where, asked)], "auto", where, "raise")
        rows.append(Asking(where, written, read.rows[0]))
    return rows


def _question(row: Row, as_chat: bool) -> Row:
    """Return only what a row asks, where it says that outright; others as they are."""
    turns, prompt = row.get("messages"), row.get("prompt")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        if ROLES.get(str(turns[-1].get("role"))) == "assistant":
            return row
        prompt = turns
    elif as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif "chosen" in row or not prompt:
        return row
    return {"prompt": prompt} | {key: row[key] for key in ("tools", "system") if key in row}


def prompts_of(rows: list[Asking], tokenizer: Any) -> list[Prompt]:
    """Return what each row asks, as text: turns by the chat template, texts as they are.

    Raises:
        DataError: a row asks nothing, or is a chat and there is no template that takes it.
    """
    prompts = []
    for each in rows:
        chat = "messages" in each.row or isinstance(each.row.get("prompt"), list)
        if chat and not tokenizer.chat_template:
            text = "a chat, but the tokenizer has no chat template; give the prompt as text"
            raise DataError(f"{each.where}: {text}")
        try:
            prompt = prompt_of(each.row, tokenizer)
        except DataError as error:
            raise DataError(f"{each.where}: {error}") from error
        if prompt is None:
            text = "asks nothing; give a prompt, or turns that end with a question"
            raise DataError(f"{each.where}: {text}")
        prompts.append(prompt)
    return prompts
