"""What two models make of the same prompt, and how far apart they are, in logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

Bare = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Seen:
    """What a model makes of a prompt, and answers."""

    ids: list[int]  # prompt and answer
    asked: int  # how many of them are the prompt
    logits_TV: Tensor  # before each next token; float32
    effect: float = 0.0  # the largest difference to the base without the adapter

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.asked :]


@torch.no_grad()
def seen(
    model: Any, prompt: list[int], new: int, like: Seen | None = None, bare: Bare | None = None
) -> Seen:
    """Answer a prompt greedily, then read the logits over it and the answer.

    Args:
        model: any that transformers has, also one that only classifies.
        prompt: its tokens.
        new: tokens of an answer at most.
        like: what another model answered; its tokens are read in place of the own answer's.
        bare: opens a block in which the model computes without what was trained; None: a
            PeftModel's own.
    """
    ids = torch.tensor([prompt], device=model.device)
    if not model.can_generate():  # a classifier
        answered = prompt
    else:
        answered = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )[0].tolist()  # fmt: skip
    if model.config.is_encoder_decoder:
        answered = prompt + answered
    own = Seen(answered, len(prompt), torch.empty(0))
    logits_TV = _logits(model, like or own)
    effect = 0.0
    if bare is None and isinstance(model, PeftModel):
        bare = model.disable_adapter
    if like is None and bare is not None:
        with bare():
            effect = float((logits_TV - _logits(model, own)).abs().max())
    return replace(own, logits_TV=logits_TV, effect=effect)


def _logits(model: Any, seen: Seen) -> Tensor:
    """Return the logits over prompt and answer, or over the answer of an encoder-decoder."""
    read = [seen.ids]
    told = {}
    if model.config.is_encoder_decoder:
        read = [seen.ids[: seen.asked]]
        told = {"decoder_input_ids": torch.tensor([seen.answer], device=model.device)}
    ids = torch.tensor(read, device=model.device)
    own: Tensor = model(input_ids=ids, use_cache=False, **told).logits[0]
    return own.reshape(-1, own.shape[-1]).float().cpu()


@dataclass(frozen=True)
class Apart:
    """How far the merged model is from the adapter on one prompt, summed over its places."""

    largest: float
    total: float
    kl: float
    agree: int
    same_text: bool


def apart(want: Seen, got: Seen) -> Apart:
    """Compare what two models make of the same tokens; KL(want || got) in nats."""
    first, second = want.logits_TV, got.logits_TV
    difference = (first - second).abs()
    logs = first.log_softmax(-1)
    return Apart(
        float(difference.max()),
        float(difference.sum()),
        float((logs.exp() * (logs - second.log_softmax(-1))).sum()),
        int((first.argmax(-1) == second.argmax(-1)).sum()),
        want.answer == got.answer,
    )
