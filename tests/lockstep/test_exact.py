"""What may be computed together is measured."""

from __future__ import annotations

import math
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
from lora_exp.lockstep.exact import rows_alike, unfusable
from lora_exp.lockstep.segment import Mode
from lora_exp.lockstep.state import PLAIN

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def small(config_class: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SMALL, **more))
    return model.requires_grad_(False)


class Mixing(nn.Linear):
    """A product that looks at all its rows, as 8-bit ones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x.abs().amax()


def test_a_layer_whose_rows_see_each_other_is_never_alike() -> None:
    assert rows_alike(Mixing(32, 48), torch.float32, True) == math.inf


def test_an_ordinary_layer_is_alike_from_some_rows_on() -> None:
    assert rows_alike(nn.Linear(64, 96, bias=False), torch.float32, True) <= 64


@pytest.mark.parametrize(
    "model",
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (Qwen3Config, {}),
        (MistralConfig, {"sliding_window": None}),
    ],
    ids=["llama", "llama with biases", "qwen3", "mistral"],
)
def test_architectures_whose_pass_is_exact(model: tuple[Any, dict[str, Any]]) -> None:
    built = small(model[0], **model[1])
    assert unfusable(built) is None
    assert FusedBody(built.base_model, "exact").enter(Mode(PLAIN, True, False))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ((MistralConfig, {"sliding_window": 8}), "slides"),
        ((LlamaConfig, {"attention_dropout": 0.1}), "dropout of its own"),
        ((MixtralConfig, {"num_local_experts": 2}), "no linear layer's"),
        ((LlamaConfig, {"attn_implementation": "eager"}), "not sdpa"),
    ],
)
def test_architectures_that_share_no_pass_say_why(
    model: tuple[Any, dict[str, Any]], why: str
) -> None:
    assert why in (unfusable(small(model[0], **model[1])) or "")


def test_a_body_whose_layers_see_other_rows_does_not_pass_its_proof() -> None:
    built = small(LlamaConfig)
    fused = FusedBody(built.base_model, "exact")

    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(1, keepdim=True)

    fused.body.norm = Centred()
    assert not fused.enter(Mode(PLAIN, True, False))
