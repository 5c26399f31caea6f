"""Tokens that end an answer, and those that pad a batch; the same in training and after it."""

from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import Tokenizer

from lora_exp.data.template import turn_end


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer.

    They are the tokenizer's, those that the model names, and what the chat template ends an answer
    with: a base that learns chats often has another EOS token than its template.
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    end = turn_end(tokenizer)
    turn = tokenizer.convert_tokens_to_ids(end) if end is not None else None
    return sorted({tokenizer.eos_token_id, turn, *stops} - {None})


def set_end_tokens(model: Any, tokenizer: Any) -> None:
    """Let a model stop at all of them, also in trainers and programs that ask the model alone."""
    if not model.can_generate():
        return
    stops = end_tokens(model, tokenizer)
    named = model.generation_config.eos_token_id
    if set(stops) - {*(named if isinstance(named, list) else [named])}:
        model.generation_config.eos_token_id = stops


def ensure_pad_token(tokenizer: Any) -> None:
    """Let a tokenizer without a pad token pad with its end token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def without_end(tokenizer: Any) -> Any:
    """Return a tokenizer that adds no EOS token to a text: itself, or a copy.

    TRL's trainers tokenise prompts and answers for themselves, and add the EOS token to answers.
    """
    end = tokenizer.eos_token_id
    if end is None or tokenizer("")["input_ids"][-1:] != [end]:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    outer = state["post_processor"] or {}
    for processor in outer.get("processors", [outer]):
        for template in (processor[key] for key in ("single", "pair") if key in processor):
            while template[-1].get("SpecialToken", {}).get("id") == tokenizer.eos_token:
                template.pop()
    other = copy.deepcopy(tokenizer)
    written = Tokenizer.from_str(json.dumps(state))
    other.backend_tokenizer.post_processor = written.post_processor
    return other
