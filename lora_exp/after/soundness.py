"""Whether a whole model can be used as it lies there: weights, tokenizer, and where it stops."""

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


class _Ends(LogitsProcessor):  # type: ignore[misc]
    """Say the end token third, to see whether the model's own settings stop there."""

    def __init__(self, end: int, every: list[int], asked: int) -> None:
        self.end, self.every, self.at = end, every, asked + 2

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        if ids_BT.shape[1] == self.at:
            forced = torch.full_like(scores_BV, float("-inf"))
            forced[:, self.end] = 0
            return forced
        barred = scores_BV.clone()
        barred[:, self.every] = float("-inf")
        return barred


def examine(path: str | Path) -> dict[str, str | None]:
    """See whether a model can be used as it lies there.

    Returns:
        What was looked at -> what is wrong with it, or None.

    Raises:
        SavedError: no whole model lies there.
        ConfigError: it cannot be loaded.
    """
    quiet()
    saved = find(path)
    if saved.adapter is not None:
        raise SavedError(f"{saved.folder} is an adapter; check takes a merged or whole model")
    base = load_base(saved)
    model, tokenizer = base.model.eval(), tokenizer_of(saved, base)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    found = {"weights are finite": f"{len(bad)} are not, the first is {bad[0]}" if bad else None}
    found["tokenizer fits the embeddings"] = missing_embeddings(model, tokenizer)
    if bad or not model.can_generate():
        return found
    return found | _generates(model, tokenizer)


def _generates(model: Any, tokenizer: Any) -> dict[str, str | None]:
    end = tokenizer.eos_token_id
    prompt = torch.tensor([tokenizer("Hello")["input_ids"]], device=model.device)
    told = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        made = model.generate(input_ids=prompt, **told)
        found = {"generates": None if made.shape[1] > prompt.shape[1] else "no token came"}
        if end is None:
            return found | {"ends at EOS": "the tokenizer has no end token"}
        forced = LogitsProcessorList([_Ends(end, end_tokens(model, tokenizer), prompt.shape[1])])
        ended = model.generate(input_ids=prompt, logits_processor=forced, **told)
    length = ended.shape[1] - prompt.shape[1]
    wrong = (
        f"goes on after {tokenizer.eos_token!r}; generation_config.json has another eos_token_id"
    )
    return found | {"ends at EOS": None if length == 3 else wrong}
