"""Packed rows that would see each other are found out by measuring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
)

from lora_exp.errors import ConfigError
from lora_exp.model.packing import keeps_rows_apart

SMALL = {"vocab_size": 300, "initializer_range": 0.2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
BLOOM = BloomConfig(**SMALL, n_layer=2, n_head=2, hidden_size=32)
WIDE = {"intermediate_size": 64, "num_key_value_heads": 2}


def made(config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **more).train()


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (LlamaConfig(**SMALL, **LAYERS, **WIDE), True),
        (Qwen3Config(**SMALL, **LAYERS, **WIDE, head_dim=16), True),
        (GPT2Config(**SMALL, n_layer=2, n_head=2, n_embd=32), True),
        (FalconConfig(**SMALL, **LAYERS, alibi=False), False),
        (FalconConfig(**SMALL, **LAYERS, alibi=True), False),
        (BLOOM, False),
        (MptConfig(**SMALL, n_layers=2, n_heads=2, d_model=32), False),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_architectures_keep_rows_apart_or_do_not(config: Any, apart: bool) -> None:
    model = made(config)
    before = torch.random.get_rng_state()
    assert keeps_rows_apart(model) == apart
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def test_eager_attention_and_half_precision_are_measured_as_well() -> None:
    config = LlamaConfig(**SMALL, **LAYERS, **WIDE)
    assert keeps_rows_apart(made(config, attn_implementation="eager"))
    assert keeps_rows_apart(made(config, dtype=torch.bfloat16))


def test_packing_is_refused_where_rows_see_each_other(
    quick_run: Callable[..., Any], tmp_path: Path, base: Any
) -> None:
    config = FalconConfig(**SMALL | {"vocab_size": 512}, **LAYERS, alibi=True)
    made(config).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    model = ["model=local", f"model.path={tmp_path / 'base'}"]
    for key in ("packing=true", "+padding_free=true"):
        sign, name = ("+", key[1:]) if key[0] == "+" else ("", key)
        with pytest.raises(ConfigError, match="FalconForCausalLM does not keep rows apart"):
            quick_run(*model, f"{sign}algorithm.args.{name}", name=name.partition("=")[0])
