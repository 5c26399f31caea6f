"""Two models on the same tokens: their answers, and the distance of their logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_exp.after.difference import Response, compare, respond


def test_distances_equal_a_hand_calculation() -> None:
    """Of [ln 3, 0] and [0, 0]: KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    expected = Response([7, 8, 9], 2, torch.tensor([[math.log(3), 0.0], [0.0, 1.0]]))
    got = Response([7, 8, 9], 2, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    difference = compare(expected, got)
    assert difference.largest == pytest.approx(math.log(3))
    assert difference.total == pytest.approx(math.log(3) + 2)
    second = (math.e - 1) / (math.e + 1)  # KL of [0, 1] and [1, 0]
    assert difference.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5) + second)
    assert difference.same_top1 == 1
    assert difference.same_text
    assert not compare(expected, Response([7, 8, 1], 2, got.logits_TV)).same_text


def test_logits_can_be_read_on_another_models_answer(base: Any) -> None:
    prompt = base.tokenizer("Mirror: a b c")["input_ids"]
    response = respond(base.model, prompt, 4)
    assert response.ids[: response.prompt_length] == prompt
    assert 0 < len(response.answer) <= 4
    assert len(response.logits_TV) == len(response.ids)
    assert (
        response.answer == response.logits_TV[response.prompt_length - 1 : -1].argmax(-1).tolist()
    )
    reference = Response([*prompt, 5, 6, 7], len(prompt), torch.empty(0))
    on_reference = respond(base.model, prompt, 4, reference=reference)
    assert on_reference.answer == response.answer
    assert len(on_reference.logits_TV) == len(reference.ids)
    assert response.effect == 0.0  # it has no adapter


def test_an_adapters_effect_is_the_largest_change_of_a_logit(fresh_base: Any) -> None:
    prompt = fresh_base.tokenizer("Mirror: a b c")["input_ids"]
    model = get_peft_model(fresh_base.model, LoraConfig(target_modules="all-linear")).eval()
    assert respond(model, prompt, 4).effect == 0.0  # B is zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted = respond(model, prompt, 4)
    with model.disable_adapter():
        bare = respond(model.get_base_model(), prompt, 4, reference=adapted)
    assert adapted.effect == compare(adapted, bare).largest > 0
