"""Tokens that end an answer, and those that pad a batch; the same in training and after it."""

from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import Tokenizer

from lora_exp.data.template import turn_end


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer.

    They are the tokenizer's EOS token, the model's, and the token that ends an answer in the chat
    template: a base that learns chats often has another EOS token than its template.
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    end = turn_end(tokenizer)
    turn_id = tokenizer.convert_tokens_to_ids(end) if end is not None else None
    return sorted({tokenizer.eos_token_id, turn_id, *stops} - {None})


def set_end_tokens(model: Any, tokenizer: Any) -> None:
    """Set all end tokens in a model's generation config, for trainers and programs that read it."""
    if not model.can_generate():
        return
    stops = end_tokens(model, tokenizer)
    configured = model.generation_config.eos_token_id
    if set(stops) - {*(configured if isinstance(configured, list) else [configured])}:
        model.generation_config.eos_token_id = stops


def ensure_pad_token(tokenizer: Any) -> None:
    """Let a tokenizer without a pad token pad with its EOS token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def without_end(tokenizer: Any) -> Any:
    """Return a tokenizer that adds no EOS token to a text: itself, or a copy.

    TRL's trainers tokenise prompts and answers separately, and add the EOS token to answers.
    """
    end = tokenizer.eos_token_id
    if end is None or tokenizer("")["input_ids"][-1:] != [end]:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    post_processor = state["post_processor"] or {}
    for processor in post_processor.get("processors", [post_processor]):
        for template in (processor[key] for key in ("single", "pair") if key in processor):
            while template[-1].get("SpecialToken", {}).get("id") == tokenizer.eos_token:
                template.pop()
    edited = copy.deepcopy(tokenizer)
    backend = Tokenizer.from_str(json.dumps(state))
    edited.backend_tokenizer.post_processor = backend.post_processor
    return edited
