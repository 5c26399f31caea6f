"""Rows that ask something: read from a file of any format that training takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_exp.data import jsonl
from lora_exp.errors import DataError
from lora_exp.formats import Row
from lora_exp.tokens import Prompt, prompt_of


def read(path: str | Path, tokenizer: Any, as_chat: bool = False) -> list[tuple[Row, Prompt]]:
    """Read rows and what each asks.

    Args:
        path: JSON Lines, or a glob; rows of turns ask by the chat template, texts as they are.
        tokenizer: whose chat template it is.
        as_chat: a `prompt` that is text is a user's turn.

    Raises:
        DataError: by file, line and field, what cannot be used; or a row asks nothing.
    """
    rows = jsonl(str(path), None, 0.0, "auto", None, None, None, "raise").train
    asked = []
    for number, row in enumerate(rows, 1):
        if as_chat and isinstance(row.get("prompt"), str):
            row = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
            known = row.get("completion")
            row |= {"completion": [{"role": "assistant", "content": known}]} if known else {}
        prompt = prompt_of(row, tokenizer)
        if prompt is None:
            raise DataError(f"{path} row {number}: asks nothing; give a prompt, or turns")
        asked.append((row, prompt))
    return asked
