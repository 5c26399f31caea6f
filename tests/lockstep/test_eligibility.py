"""Which bases can share a pass, and why others cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.eligibility import base_obstacle
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import PLAIN

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def small_model(config_class: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SMALL | changes))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "model",
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (Qwen3Config, {}),
        (MistralConfig, {"sliding_window": None}),
        (LlamaConfig, {"intermediate_size": 65}),  # a job's rows may begin at any memory address
    ],
    ids=["llama", "llama with biases", "qwen3", "mistral", "an odd width"],
)
def test_the_pass_of_these_architectures_is_exact(model: tuple[Any, dict[str, Any]]) -> None:
    built = small_model(model[0], **model[1])
    assert base_obstacle(built) is None
    assert FusedBody(built.base_model, "exact").enter(PassContext(PLAIN, True, False))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ((MistralConfig, {"sliding_window": 8}), "slides"),
        ((LlamaConfig, {"attention_dropout": 0.1}), "dropout of its own"),
        ((MixtralConfig, {"num_local_experts": 2}), "no linear layer's"),
        ((LlamaConfig, {"attn_implementation": "eager"}), "not sdpa"),
    ],
)
def test_an_architecture_that_cannot_share_a_pass_gives_the_reason(
    model: tuple[Any, dict[str, Any]], reason: str
) -> None:
    assert reason in (base_obstacle(small_model(model[0], **model[1])) or "")


def test_a_body_whose_rows_depend_on_each_other_is_not_exact() -> None:
    built = small_model(LlamaConfig)
    fused = FusedBody(built.base_model, "exact")

    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(1, keepdim=True)

    fused.body.norm = Centred()
    assert not fused.enter(PassContext(PLAIN, True, False))
