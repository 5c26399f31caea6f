"""Prompts, read from files of any format that training takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.data.conversion import convert, validate
from lora_exp.data.reading import files, lines
from lora_exp.data.rendered import Prompt, prompt_of
from lora_exp.data.turns import ROLES, SYSTEM, Row
from lora_exp.errors import DataError


@dataclass(frozen=True)
class PromptRow:
    """A row with a prompt."""

    where: str  # file and line
    original: Row  # as in the file
    row: Row  # converted

    @property
    def expected(self) -> Any:
        """The known answer, as it is in the file; None: there is none."""
        answer = self.original.get("completion", self.original.get("answer"))
        if answer is None:
            answer = self.row.get("messages", self.row.get("chosen"))
            if isinstance(answer, list):
                last = answer[-1]
                answer = last["content"] if last["role"] == "assistant" else None
        return answer or None


def read(path: str | Path, as_chat: bool = False) -> list[PromptRow]:
    """Read prompts; each row may have its own format, and a chat may end with a user's turn.

    Args:
        path: JSON Lines, or a glob.
        as_chat: treat a `prompt` that is text as a user's turn.

    Raises:
        DataError: a row cannot be used (with file, line and field), or there are no rows.
    """
    numbered: list[tuple[str, Any]] = [row for file in files(str(path)) for row in lines(file)]
    if not numbered:
        raise DataError(f"{path}: no rows")
    rows = []
    for where, original in numbered:
        prompt = _prompt_only(validate(original, where), as_chat)
        converted = convert([(where, prompt)], "auto", where, "raise")
        rows.append(PromptRow(where, original, converted.rows[0]))
    return rows


def _prompt_only(row: Row, as_chat: bool) -> Row:
    """Return only the prompt of a row, if the row shows where it ends; else the row itself."""
    turns, prompt = row.get("messages"), row.get("prompt")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        if ROLES.get(str(turns[-1].get("role"))) == "assistant":
            return row
        prompt = turns
    elif as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif "chosen" in row or not prompt:
        return row
    return {"prompt": prompt} | {key: row[key] for key in ("tools", *SYSTEM) if key in row}


def prompts_of(rows: list[PromptRow], tokenizer: Any) -> list[Prompt]:
    """Return the rows' prompts as text: turns are rendered with the chat template.

    Raises:
        DataError: a row has no prompt, or is a chat that no template can render.
    """
    prompts = []
    for prompt_row in rows:
        where, row = prompt_row.where, prompt_row.row
        is_chat = "messages" in row or isinstance(row.get("prompt"), list)
        if is_chat and not tokenizer.chat_template:
            text = "a chat, but the tokenizer has no chat template; give the prompt as text"
            raise DataError(f"{where}: {text}")
        try:
            prompt = prompt_of(row, tokenizer)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if prompt is None:
            text = "has no prompt; give a prompt, or turns that end with a user's turn"
            raise DataError(f"{where}: {text}")
        prompts.append(prompt)
    return prompts
