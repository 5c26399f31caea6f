"""Loading: dtypes, quantisation, revisions, and errors by their key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoTokenizer, CodeGenConfig

from lora_exp import compose
from lora_exp.config.door import build
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.loading import bnb_8bit, freeze
from tests.conftest import tiny


def load_base(*overrides: str) -> Any:
    cfg = compose(*overrides)
    return build(cfg, "model", quantization=build(cfg, "quant"))


def test_the_base_is_frozen_padded_and_identified(base: Any) -> None:
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.pad_token == "<|endoftext|>"
    assert base.revision.startswith("sha256:")
    assert base.warnings == ()


@pytest.mark.parametrize(
    ("quant", "layer", "quant_type"),
    [("nf4", Linear4bit, "nf4"), ("fp4", Linear4bit, "fp4"), ("int8", Linear8bitLt, None)],
)
def test_a_quantised_base_has_the_configured_layers(
    quant: str, layer: type, quant_type: str | None
) -> None:
    model = load_base(f"quant={quant}").model
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is layer
    assert not isinstance(model.lm_head, Linear4bit | Linear8bitLt)
    if quant_type:
        assert linear.weight.quant_state.quant_type == quant_type
        assert linear.weight.quant_state.nested


def test_auto_takes_the_attention_that_a_class_has(folder_of: Callable[[Any], Path]) -> None:
    codegen = folder_of(CodeGenConfig(vocab_size=512, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    assert load_base("model=local", f"model.path={codegen}").attention == "eager"
    assert load_base().attention == "sdpa"
    with pytest.raises(ConfigError, match=r"^model.attn_implementation: .*sdpa; auto takes"):
        load_base("model=local", f"model.path={codegen}", "model.attn_implementation=sdpa")


def test_an_evaluation_on_any_cpu_leaves_4_bit_weights_unchanged() -> None:
    base = load_base("quant=nf4")
    linear = base.model.model.layers[0].mlp.up_proj
    linear.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on such CPUs
    freeze(base.model, base.tokenizer)
    assert not linear.support_avx512bf16_for_cpu
    before = linear.weight.data.clone()
    with torch.no_grad():
        base.model.eval()(input_ids=torch.tensor([[1, 5, 6]]))
    assert torch.equal(before, linear.weight.data)


def test_a_config_error_while_loading_keeps_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    path = asset("pkg://lora_exp/assets/tiny")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"^model.gguf_file: x.gguf of a hub model"):
        tiny(bnb_8bit(6.0), path=str(path), gguf_file="x.gguf", dtype="auto")


def test_a_folder_without_a_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.path: .* cannot be loaded"):
        load_base("model=local", f"model.path={tmp_path}")
