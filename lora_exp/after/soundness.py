"""Whether a whole model is usable: its weights, its tokenizer, and where it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lora_exp.after.loading import load_base, tokenizer_of
from lora_exp.after.saved import find
from lora_exp.errors import SavedError
from lora_exp.model.special_tokens import end_tokens
from lora_exp.model.vocabulary import missing_embeddings
from lora_exp.record.progress import quiet


class _ForcedEnd(LogitsProcessor):  # type: ignore[misc]
    """Forces the end token as the third one, to test whether the model's settings stop there."""

    def __init__(self, end: int, end_ids: list[int], prompt_length: int) -> None:
        self.end, self.end_ids, self.length = end, end_ids, prompt_length + 2

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        if ids_BT.shape[1] == self.length:
            forced = torch.full_like(scores_BV, float("-inf"))
            forced[:, self.end] = 0
            return forced
        allowed = scores_BV.clone()
        allowed[:, self.end_ids] = float("-inf")
        return allowed


def check_model(path: str | Path) -> dict[str, str | None]:
    """Check whether a model is usable.

    Returns:
        What was checked, and what is wrong with it, or None.

    Raises:
        SavedError: there is no whole model.
        ConfigError: it cannot be loaded.
    """
    quiet()
    saved = find(path)
    if saved.adapter is not None:
        raise SavedError(f"{saved.folder} is an adapter; check takes a merged or whole model")
    base = load_base(saved)
    model, tokenizer = base.model.eval(), tokenizer_of(saved, base)
    not_finite = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    text = f"{len(not_finite)} are not, the first is {not_finite[0]}" if not_finite else None
    results = {"weights are finite": text}
    results["tokenizer fits the embeddings"] = missing_embeddings(model, tokenizer)
    if not_finite or not model.can_generate():
        return results
    return results | _check_generation(model, tokenizer)


def _check_generation(model: Any, tokenizer: Any) -> dict[str, str | None]:
    end = tokenizer.eos_token_id
    prompt = torch.tensor([tokenizer("Hello")["input_ids"]], device=model.device)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        output = model.generate(input_ids=prompt, **options)
        text = None if output.shape[1] > prompt.shape[1] else "no token was generated"
        results = {"generates": text}
        if end is None:
            return results | {"ends at EOS": "the tokenizer has no end token"}
        forced = LogitsProcessorList(
            [_ForcedEnd(end, end_tokens(model, tokenizer), prompt.shape[1])]
        )
        output = model.generate(input_ids=prompt, logits_processor=forced, **options)
    length = output.shape[1] - prompt.shape[1]
    text = f"continues after {tokenizer.eos_token!r}; check eos_token_id in generation_config.json"
    return results | {"ends at EOS": None if length == 3 else text}
