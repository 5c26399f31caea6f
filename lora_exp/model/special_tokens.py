"""Tokens that end an answer, and those that pad a batch; the same in training and after it."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from tokenizers import Tokenizer

from lora_exp.data.template import turn_end
from lora_exp.errors import ConfigError

# names of special tokens that tokenizers keep for padding, or for nothing; images have others
UNUSED = (re.compile(r"(?i)(?<!image_)(?<!video_)(?<!vision_)(?<!audio_)pad"),
          re.compile(r"(?i)reserved|unused"))  # fmt: skip


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
    """Let a tokenizer without a pad token pad with a special token that no text has.

    Where there is none it pads with its EOS token; labels, scores and answers do not take that for
    padding, since they are masked by position.

    Raises:
        ConfigError: it has no such token, and no EOS token.
    """
    if tokenizer.pad_token is not None:
        return
    if (unused := unused_token(tokenizer)) is None and tokenizer.eos_token is None:
        fix = "name its eos_token in tokenizer_config.json"
        raise ConfigError(
            [("model.path", f"its tokenizer has neither a pad nor an EOS token; {fix}")]
        )
    tokenizer.pad_token = unused or tokenizer.eos_token


def unused_token(tokenizer: Any) -> str | None:
    """Return a special token that pads, is reserved, or stands for the unknown; None: no such."""
    added = tokenizer.added_tokens_decoder
    used = {tokenizer.bos_token, tokenizer.eos_token}
    special = [
        str(added[i]) for i in sorted(added) if added[i].special and str(added[i]) not in used
    ]
    for pattern in UNUSED:
        if names := [name for name in special if pattern.search(name)]:
            return names[0]
    return tokenizer.unk_token if tokenizer.unk_token in special else None


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
