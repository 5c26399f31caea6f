"""Mixtures of experts: router logits only where a trainer asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, GraniteMoeConfig

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


@pytest.mark.parametrize(("experts", "coefficient"), [(0, 0.0), (4, 0.01)])
def test_a_dense_model_of_a_mixtures_class_has_no_balance_loss(
    experts: int, coefficient: float
) -> None:
    config = AutoConfig.for_model(
        "granitemoehybrid", num_local_experts=experts, router_aux_loss_coef=0.01
    )
    name_experts(SimpleNamespace(config=config))
    assert config.router_aux_loss_coef == coefficient
