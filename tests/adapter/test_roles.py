"""Roles by what a layer is part of, on architectures with other names than Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    JetMoeConfig,
    Lfm2Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
)

from lora_exp.adapter.roles import experts_of, modules_of, stacks_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 1}
QWEN2_MOE = Qwen2MoeConfig(**SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=16,
                           shared_expert_intermediate_size=16)  # fmt: skip
PHIMOE = PhimoeConfig(**SMALL, **EXPERTS, num_local_experts=4)
JETMOE = JetMoeConfig(**SMALL, **EXPERTS, num_local_experts=4, kv_channels=16)
GRIFFIN = RecurrentGemmaConfig(**SMALL, num_hidden_layers=3, lru_width=32)
LFM2 = Lfm2Config(**SMALL, num_hidden_layers=2, layer_types=["conv", "full_attention"])
MLA = DeepseekV2Config(
    **SMALL, num_hidden_layers=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
)  # fmt: skip
LLAMA = ["gate_proj", "up_proj", "down_proj"]


def last_names(role: str, config: Any) -> set[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name.rpartition(".")[2] for name in modules_of(role, model)}


@pytest.mark.parametrize(
    ("config", "role", "names"),
    [
        (QWEN2_MOE, "mlp", LLAMA),  # of the shared expert, without its gate
        (PHIMOE, "all_linear", ["q_proj", "k_proj", "v_proj", "o_proj"]),  # without the router
        (GRIFFIN, "attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (GRIFFIN, "mlp", LLAMA),
        (LFM2, "mlp", ["w1", "w2", "w3"]),
        (LFM2, "attention", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        (JETMOE, "all_linear", ["kv_proj"]),
        (MLA, "qv", ["q_a_proj", "q_b_proj", "kv_b_proj"]),
    ],
)  # fmt: skip
def test_a_role_has_the_layers_of_its_part(config: Any, role: str, names: list[str]) -> None:
    assert last_names(role, config) == set(names)


def test_a_mixers_layers_are_neither_attention_nor_feed_forward() -> None:
    parts = [last_names(role, GRIFFIN) for role in ("all_linear", "attention", "mlp")]
    assert parts[0] - parts[1] - parts[2] == {"linear_x", "linear_y", "linear_out"}


@pytest.mark.parametrize(
    ("config", "stacks"),
    [
        (QWEN2_MOE, {"experts.gate_up_proj": (4, 32, 32), "experts.down_proj": (4, 32, 16)}),
        (LFM2, {}),
    ],
)  # fmt: skip
def test_experts_are_stacks_of_weights(config: Any, stacks: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = stacks_of("experts", model)
    assert {
        name.removeprefix("model.layers.0.mlp."): shape for name, shape in found.items()
    } == stacks
    assert bool(experts_of(model)) == bool(stacks)
    assert stacks_of("all_linear", model) == {}
