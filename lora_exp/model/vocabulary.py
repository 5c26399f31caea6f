"""Tokens and their embeddings: whether each has one, and new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_exp.errors import ConfigError


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, and their rows to the model's embeddings.

    Each new row is the mean of the rows before, so that it changes no other token's probability
    much (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), and no random number is drawn.

    Raises:
        ConfigError: one is a token already, or is named twice.
    """
    if not tokens:
        return
    known, count = tokenizer.get_vocab(), len(tokenizer)
    for i, token in enumerate(tokens):
        if token in known or token in tokens[:i]:
            text = f"{token!r} is a token already; leave it out"
            raise ConfigError([("model.add_tokens", text)])
    tokenizer.add_tokens(list(tokens))
    grow(model, len(tokenizer))
    _set_to_mean(model, count, len(tokenizer))  # a base may have had unused rows for them


def grow(model: Any, rows: int) -> None:
    """Give a model embeddings for this many tokens, if it has fewer."""
    before = len(model.get_input_embeddings().weight)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.requires_grad_(False)
        _set_to_mean(model, before, rows)


@torch.no_grad()
def _set_to_mean(model: Any, start: int, stop: int) -> None:
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if rows is not None and len(rows) >= stop:
                rows[start:stop] = rows[:start].float().mean(0).to(rows.dtype)


def missing_embeddings(model: Any, tokenizer: Any) -> str | None:
    """Return a text that names the tokens without an embedding; None: each has one.

    A token that was added only to the tokenizer causes an index error when it is first used.

    Args:
        model: with or without an adapter.
        tokenizer: the one that is used with it.
    """
    rows = len(model.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab()
    missing = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if not missing:
        return None
    names = ", ".join(repr(token) for _, token in missing[:3]) + (", ..." if missing[3:] else "")
    return f"the tokenizer has tokens without an embedding ({names}): {len(missing)} beyond {rows}"
