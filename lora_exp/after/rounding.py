"""What float32's rounding of the weights alone changes in a model's logits: a merge rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_exp.after.difference import Response, compare, respond

UNIT = 2.0**-24  # the largest relative error of a rounded float32
DRAWS = 2
TIMES = 4  # the largest of other draws, and of other tokens
SHARE = 0.005  # of the adapter's effect: an update that is 1% too large changes twice as much


@torch.no_grad()
def rounding_effect(model: Any, responses: Sequence[Response]) -> float:
    """Return the largest change of a logit when all weights change by up to float32's rounding.

    Most architectures compute wholly in the dtype of their weights. Some compute a part in float32
    whatever they are given, as gated delta rules and state spaces do, and multiply its errors; a
    router may choose another expert. No merge of theirs can be closer than this.

    Args:
        model: in float64; its weights are changed.
        responses: of the model, to the prompts that are compared.
    """
    largest, generator = 0.0, torch.Generator(model.device).manual_seed(0)
    for _ in range(DRAWS):
        for parameter in model.parameters():
            error = torch.empty_like(parameter).uniform_(-UNIT, UNIT, generator=generator)
            parameter.mul_(1 + error)
        for response in responses:
            prompt = response.ids[: response.prompt_length]
            largest = max(largest, compare(response, respond(model, prompt, 1, response)).largest)
    return largest


def allowance(rounding: float, effect: float) -> float:
    """Return how far a right merge may be from its adapter by rounding, and a wrong one is not.

    Args:
        rounding: the result of `rounding_effect`.
        effect: of the adapter, on the same logits.
    """
    return min(TIMES * rounding, SHARE * effect)
