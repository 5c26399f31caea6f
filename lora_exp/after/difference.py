"""The difference between two models' logits and answers for the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lora_exp.after.routing import Routing

AdapterOff = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Response:
    """A model's answer to a prompt, and its logits."""

    ids: list[int]  # prompt and answer
    prompt_length: int  # how many of them are the prompt
    logits_TV: Tensor  # before each next token; float32
    effect: float = 0.0  # the adapter's: the largest difference to the logits without it, whose
    # tokens go to the same experts
    routing: Routing = field(default_factory=Routing)  # of the pass that computed the logits

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return self.ids[: self.prompt_length]

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.prompt_length :]


@torch.no_grad()
def respond(
    model: Any,
    prompt: list[int],
    max_new_tokens: int,
    reference: Response | None = None,
    adapter_off: AdapterOff | None = None,
) -> Response:
    """Answer a prompt greedily, then compute the logits of prompt and answer.

    Args:
        model: any model of transformers, also a classifier.
        prompt: its tokens.
        max_new_tokens: of the answer.
        reference: another model's response: its tokens get the logits instead of the answer's,
            and go to the experts that it chose.
        adapter_off: a context in which the model computes without the adapter; None: a
            PeftModel's own.
    """
    ids = torch.tensor([prompt], device=model.device)
    if not model.can_generate():  # a classifier
        output = prompt
    else:
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )[0].tolist()  # fmt: skip
    if model.config.is_encoder_decoder:
        output = prompt + output
    response = Response(output, len(prompt), torch.empty(0))
    forced = force(model, reference or response)
    effect = 0.0
    if adapter_off is None and isinstance(model, PeftModel):
        adapter_off = model.disable_adapter
    if reference is None and adapter_off is not None:
        with adapter_off():
            effect = float((forced.logits_TV - force(model, forced).logits_TV).abs().max())
    return replace(forced, ids=output, effect=effect)


@torch.no_grad()
def force(model: Any, reference: Response) -> Response:
    """Compute a model's logits of another's response, whose tokens go to the experts it chose."""
    with Routing(reference.routing.decisions) as routing:
        logits_TV = _logits(model, reference)
    return replace(reference, logits_TV=logits_TV, routing=routing)


def _logits(model: Any, response: Response) -> Tensor:
    """Return the logits over prompt and answer, or over the answer of an encoder-decoder."""
    input_ids = response.ids
    decoder_inputs = {}
    if model.config.is_encoder_decoder:
        input_ids = response.prompt
        answer = torch.tensor([response.answer], device=model.device)
        decoder_inputs = {"decoder_input_ids": answer}
    ids = torch.tensor([input_ids], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, **decoder_inputs).logits[0]
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


@dataclass(frozen=True)
class Difference:
    """The difference between two responses, over all positions."""

    largest: float  # of a logit
    total: float  # of all logits, absolute
    kl: float  # the sum, in nats
    same_top1: int  # positions with the same most likely next token
    same_text: bool
    experts: int  # that the expected model's routers chose
    same_experts: int  # of these, those that the other's would have chosen, too


def compare(expected: Response, actual: Response) -> Difference:
    """Compare two models' responses for the same tokens; the KL is KL(expected || actual)."""
    first, second = expected.logits_TV, actual.logits_TV
    difference = (first - second).abs()
    logprobs_TV = first.log_softmax(-1)
    return Difference(
        float(difference.max()),
        float(difference.sum()),
        float((logprobs_TV.exp() * (logprobs_TV - second.log_softmax(-1))).sum()),
        int((first.argmax(-1) == second.argmax(-1)).sum()),
        expected.answer == actual.answer,
        actual.routing.chosen,
        actual.routing.same,
    )
