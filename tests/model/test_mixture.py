"""Mixtures of experts: router logits only where a trainer asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GraniteMoeConfig

from lora_exp.errors import ConfigError
from lora_exp.model.mixture import name_experts

GRANITE = GraniteMoeConfig(
    vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    router_aux_loss_coef=0.01, output_router_logits=True,
)  # fmt: skip


def test_a_trained_mixture_answers_and_is_saved_without_a_trainers_settings(
    folder_of: Callable[[Any], Path], quick_run: Callable[..., Any]
) -> None:
    folder = folder_of(GRANITE)
    result = quick_run(
        "model=local", f"model.path={folder}", "peft=none", "samples.rows=1",
        "+algorithm.args.router_aux_loss_coef=0.5", "train.max_steps=1",
    )  # fmt: skip
    assert "before/exact_match" in result.metrics  # it has answered
    rows = map(json.loads, (result.directory / "metrics.jsonl").read_text().splitlines())
    assert any(row.get("train/aux_loss", 0) > 0.5 for row in rows)
    saved = AutoConfig.from_pretrained(result.saved)
    assert (saved.output_router_logits, saved.router_aux_loss_coef) == (False, 0.01)
    assert saved.use_cache
    assert getattr(saved, "num_experts", None) is None


SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "router_aux_loss_coef": 0.01,
}  # fmt: skip
DENSE = {"layer_types": ["attention"], "num_local_experts": 0, "mamba_n_heads": 2}


@pytest.mark.parametrize(
    ("kind", "changes", "coefficient"),
    [
        ("granitemoehybrid", DENSE, 0.0),
        ("doge", {}, 0.0),  # its config counts experts even so
        ("doge", {"is_moe": True, "num_experts": 64}, 0.01),
        ("granitemoe", {"num_local_experts": 4}, 0.01),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, 0.01),  # two kinds of routers
    ],
)
def test_a_dense_model_of_a_mixtures_class_has_no_balance_loss(
    kind: str, changes: dict[str, Any], coefficient: float
) -> None:
    config = AutoConfig.for_model(kind, **SMALL | changes)
    with torch.device("meta"):
        name_experts(AutoModelForCausalLM.from_config(config))
    assert getattr(config, "router_aux_loss_coef", coefficient) == coefficient


def test_a_balance_loss_of_a_dense_model_is_refused(
    folder_of: Callable[[Any], Path], quick_run: Callable[..., Any]
) -> None:
    folder = folder_of(AutoConfig.for_model("doge", **SMALL))
    coefficient = "+algorithm.args.router_aux_loss_coef=0.5"
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: DogeForCausalLM has no routers"):
        quick_run("model=local", f"model.path={folder}", coefficient, "samples.rows=0")
