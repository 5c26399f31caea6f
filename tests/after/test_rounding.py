"""Architectures that compute parts in float32: their merges are held against their own rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3NextConfig

from lora_exp.after.difference import respond
from lora_exp.after.merging import merge
from lora_exp.after.pages import proof as page
from lora_exp.after.proof import prove
from lora_exp.after.rounding import rounding_effect
from lora_exp.after.tolerance import Proof

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_hidden_layers": 3, "head_dim": 16,
}  # fmt: skip
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mlp_only_layers": [0, 1, 2], "initializer_range": 0.3,
    "layer_types": ["linear_attention"] * 2 + ["full_attention"],
}  # fmt: skip


def model_from(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def adapter(tmp_path: Path, base: Any) -> Path:
    """An adapter with random weights on a model with gated delta rules."""
    folder, saved = tmp_path / "base", tmp_path / "adapter"
    model_from(Qwen3NextConfig(**SMALL, **DELTA)).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    layers = ["in_proj_qkvz", "out_proj"]
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=layers)
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(saved)
    return saved


def test_a_merge_on_a_base_that_computes_in_float32_is_proven_but_not_one_that_is_1_percent_off(
    adapter: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": "red green blue " * count}) for count in (4, 9)]
    prompts.write_text("\n".join(rows))
    merged = merge([adapter], tmp_path / "merged")
    proof = prove(merged, [adapter], prompts=prompts, max_new_tokens=4)
    assert proof.max_difference > 1e-4  # so the rounding must be known
    assert proof.holds
    assert proof.tolerance <= 0.005 * proof.effect
    assert f"rounding alone: {proof.rounding:.3g}" in shown(proof)
    weights = load_file(adapter / "adapter_model.safetensors")
    off = {name: 1.01 * value if "lora_B" in name else value for name, value in weights.items()}
    save_file(off, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert not prove(merged, [adapter], prompts=prompts, max_new_tokens=4).holds


def shown(proof: Proof) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(page(proof.values()))
    return capture.get()


def test_rounding_changes_little_where_all_is_computed_in_float64() -> None:
    model = model_from(LlamaConfig(**SMALL)).double()
    response = respond(model, list(range(3, 40)), 4)
    before = model.lm_head.weight.clone()
    assert 0 < rounding_effect(model, [response], torch.float32) < 1e-5
    assert 0 < ((model.lm_head.weight - before) / before).abs().max() < 2**-22


def test_rounding_to_bfloat16_changes_more() -> None:
    model = model_from(LlamaConfig(**SMALL))
    response = respond(model, list(range(3, 40)), 4)
    before = model.lm_head.weight.clone()
    assert rounding_effect(model, [response], torch.bfloat16) > 1e-4
    assert 2**-9 < ((model.lm_head.weight - before) / before).abs().max() < 2**-6
