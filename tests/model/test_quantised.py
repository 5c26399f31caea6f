"""A quantised base: its share, what stays in floats, and layers that GPT-2 has transposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from lora_exp import compose
from lora_exp.errors import ConfigError
from lora_exp.model import loading as loading_file
from lora_exp.model.loading import base_of
from lora_exp.model.quantised import dequantise, misread, quantised_share
from tests.model.test_mixture import GRANITE

GPT2 = GPT2Config(vocab_size=512, n_embd=64, n_layer=1, n_head=2, n_positions=64)
FALCON = FalconConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, alibi=False
)


def load(folder: Path, *overrides: str) -> Any:
    return base_of(compose("model=local", f"model.path={folder}", *overrides))


@pytest.mark.parametrize("options", [["nf4"], ["nf4", "quant.experts=false"], ["int8"]])
def test_experts_of_a_mixture_have_their_part_in_the_share(
    options: list[str], folder_of: Callable[[Any], Path]
) -> None:
    base = load(folder_of(GRANITE), f"quant={options[0]}", *options[1:])
    experts, attention = 4 * 3 * 32 * 32, 4 * 32 * 32  # gate, up and down; q, k, v and o
    router = 4 * 32
    share, in_floats = base.quantised
    quantised = attention + (experts if options == ["nf4"] else 0)
    assert share == pytest.approx(quantised / (attention + experts + router))
    floats = "experts.gate_up_proj, experts.down_proj, "
    assert in_floats == ("" if options == ["nf4"] else floats) + "router"
    assert base.facts["quantised_share"] == round(share, 4)
    assert quantised_share(load(folder_of(GRANITE)).model) is None


def test_a_base_of_which_nothing_is_quantised_is_refused(
    folder_of: Callable[[Any], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^quant: .*no layer of FalconFor.*give quant=none"):
        load(folder_of(FALCON), "quant=int8")
    assert "open an issue" not in capfd.readouterr().err.replace("submit", "open")


def test_named_modules_and_the_head_stay_in_floats() -> None:
    model = base_of(compose("quant=nf4", "quant.skip_modules=[o_proj,layers.0.mlp]")).model
    layer, later = model.model.layers[0], model.model.layers[1]
    floats = (layer.self_attn.o_proj, layer.mlp.up_proj, later.self_attn.o_proj, model.lm_head)
    assert not any(isinstance(module, Linear4bit) for module in floats)
    assert isinstance(layer.self_attn.q_proj, Linear4bit)
    assert isinstance(later.mlp.up_proj, Linear4bit)
    with pytest.raises(ConfigError, match=r"skip_modules: no module of Llama.* 'o_prj'.*o_proj"):
        base_of(compose("quant=int8", "quant.skip_modules=[o_prj]"))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_transposed_layers_are_dequantised_to_their_class(
    folder_of: Callable[[Any], Path], tmp_path: Path, quant: str
) -> None:
    folder = folder_of(GPT2)
    quantised = load(folder, f"quant={quant}").model.eval()
    original = AutoModelForCausalLM.from_pretrained(folder)
    model = dequantise(quantised, torch.float32)
    layer, expected = model.transformer.h[0].mlp.c_fc, original.transformer.h[0].mlp.c_fc
    assert type(layer) is Conv1D
    assert torch.allclose(layer.weight, expected.weight, atol=0.02)
    assert torch.equal(layer.bias, expected.bias)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("rows", "width"), [(64, 64), (64, 96), (64, 160), (64, 192), (1, 96)])
def test_a_layer_that_the_processor_dequantises_wrongly_is_named(rows: int, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(rows, width)
    layer = Linear4bit(width, rows, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer.to("cpu")
    read = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    error = (read - weight).abs().mean() / weight.abs().mean()
    exact = bool(error < 0.1)  # of normal weights it is 0.09 in NF4
    assert exact or (error > 0.15 and width % 64 and rows > 1)
    warning = misread(nn.Sequential(layer))
    assert (warning is None) == exact
    assert exact or "no whole blocks of 64 weights (0)" in warning


def test_a_base_has_that_warning(
    folder_of: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(GPT2)
    monkeypatch.setattr(loading_file, "slow_products", lambda _: None)
    assert load(folder, "quant=nf4").warnings == ()
    monkeypatch.setattr(loading_file, "misread", lambda model: type(model).__name__)
    assert load(folder, "quant=nf4").warnings == ("GPT2LMHeadModel",)
