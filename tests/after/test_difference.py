"""Two models on the same tokens: what they answer, and how far apart their logits are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_exp.after.difference import Seen, apart, seen


def test_distance_as_by_hand() -> None:
    """Of [ln 3, 0] and [0, 0]: KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    want = Seen([7, 8, 9], 2, torch.tensor([[math.log(3), 0.0], [0.0, 1.0]]))
    got = Seen([7, 8, 9], 2, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    found = apart(want, got)
    assert found.largest == pytest.approx(math.log(3))
    assert found.total == pytest.approx(math.log(3) + 2)
    second = (math.e - 1) / (math.e + 1)  # of [0, 1] and [1, 0]: the difference of their shares
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5) + second)
    assert found.agree == 1
    assert found.same_text
    assert not apart(want, Seen([7, 8, 1], 2, got.logits_TV)).same_text


def test_the_logits_of_anothers_answer_are_read_where_it_is_given(base: Any) -> None:
    prompt = base.tokenizer("Mirror: a b c")["input_ids"]
    own = seen(base.model, prompt, 4)
    assert own.ids[: own.asked] == prompt
    assert 0 < len(own.answer) <= 4
    assert len(own.logits_TV) == len(own.ids)
    assert own.answer == own.logits_TV[own.asked - 1 : -1].argmax(-1).tolist()
    other = Seen([*prompt, 5, 6, 7], len(prompt), torch.empty(0))
    read = seen(base.model, prompt, 4, like=other)
    assert read.answer == own.answer
    assert len(read.logits_TV) == len(other.ids)
    assert own.effect == 0.0  # it has no adapter


def test_an_adapters_effect_is_the_largest_change_of_a_logit(fresh_base: Any) -> None:
    prompt = fresh_base.tokenizer("Mirror: a b c")["input_ids"]
    model = get_peft_model(fresh_base.model, LoraConfig(target_modules="all-linear")).eval()
    assert seen(model, prompt, 4).effect == 0.0  # B is zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted = seen(model, prompt, 4)
    with model.disable_adapter():
        bare = seen(model.get_base_model(), prompt, 4, like=adapted)
    assert adapted.effect == apart(adapted, bare).largest > 0
