"""Loading: dtypes, quantisation, revisions, and errors by their key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_exp import compose
from lora_exp.config import build
from lora_exp.errors import ConfigError
from lora_exp.model import bnb_4bit, dtype_of


def loaded(*overrides: str) -> Any:
    cfg = compose(*overrides)
    return build(cfg, "model", quantization=build(cfg, "quant"))


def test_the_base_is_frozen_padded_and_identified(base: Any) -> None:
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.pad_token == "<|endoftext|>"
    assert base.revision.startswith("sha256:")
    assert base.warning is None


@pytest.mark.parametrize(
    ("quant", "layer", "kind"),
    [("nf4", Linear4bit, "nf4"), ("fp4", Linear4bit, "fp4"), ("int8", Linear8bitLt, None)],
)
def test_a_quantised_base_has_the_layers_it_was_asked_for(
    quant: str, layer: type, kind: str | None
) -> None:
    model = loaded(f"quant={quant}").model
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is layer
    assert not isinstance(model.lm_head, Linear4bit | Linear8bitLt)
    if kind:
        assert linear.weight.quant_state.quant_type == kind
        assert linear.weight.quant_state.nested


def test_4_bit_weights_survive_an_evaluation_on_any_cpu() -> None:
    model = loaded("quant=nf4").model
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight.data.clone()
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[1, 5, 6]]))
    assert torch.equal(before, linear.weight.data)
    assert not getattr(linear, "support_avx512bf16_for_cpu", False)


def test_auto_is_float32_without_a_gpu_and_names_are_checked() -> None:
    expected = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert dtype_of("auto") is expected
    assert dtype_of("float16") is torch.float16
    with pytest.raises(ConfigError, match=r"model.dtype: 'fp32' is none of"):
        dtype_of("fp32")
    with pytest.raises(ConfigError, match=r"quant.quant_type: 'nf5' is neither"):
        bnb_4bit("nf5", True, "bfloat16")


def test_random_weights_follow_the_seed_and_differ_from_the_trained(base: Any) -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layers = loaded("model.random_weights=true", "peft=none").model.model.layers
        return layers[0].mlp.up_proj.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert not torch.equal(weight(1), base.model.model.layers[0].mlp.up_proj.weight)


def test_a_folder_without_a_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.path: .* cannot be loaded"):
        loaded("model=local", f"model.path={tmp_path}")
