"""What rounding of the weights alone changes in a model's logits: a merge rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_exp.after.difference import Response, compare, force

TIMES = 4  # the largest of other draws, and of other tokens


@torch.no_grad()
def rounding_effect(model: Any, responses: Sequence[Response], dtype: torch.dtype) -> float:
    """Return the largest change of a logit when all weights change by up to a dtype's rounding.

    Some architectures compute a part in float32 whatever they are given, as gated delta rules and
    state spaces do, and multiply errors. No merge of theirs can be closer than this.

    Args:
        model: in float32 or float64; its weights are changed.
        responses: of the model, or of another whose tokens it was given.
        dtype: of the merged weights.
    """
    unit = torch.finfo(dtype).eps / 2  # the largest relative error of a rounded number
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in model.parameters():
        error = torch.empty_like(parameter).uniform_(-unit, unit, generator=generator)
        parameter.mul_(1 + error)
    return max(compare(response, force(model, response)).largest for response in responses)
