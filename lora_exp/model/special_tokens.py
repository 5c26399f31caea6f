"""Tokens that end an answer, and those that pad a batch; the same in training and after it."""

from __future__ import annotations

from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the model names."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({tokenizer.eos_token_id, *stops} - {None})


def ensure_pad_token(tokenizer: Any) -> None:
    """Let a tokenizer without a pad token pad with its end token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
