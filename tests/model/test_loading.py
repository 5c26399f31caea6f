"""Loading: dtypes, quantisation, revisions, and errors by their key."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_exp import compose
from lora_exp.config.door import build
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.loading import bnb_8bit, settle
from tests.conftest import tiny


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
    base = loaded("quant=nf4")
    linear = base.model.model.layers[0].mlp.up_proj
    linear.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on such CPUs
    settle(base.model, base.tokenizer)
    assert not linear.support_avx512bf16_for_cpu
    before = linear.weight.data.clone()
    with torch.no_grad():
        base.model.eval()(input_ids=torch.tensor([[1, 5, 6]]))
    assert torch.equal(before, linear.weight.data)


def test_random_weights_follow_the_seed_and_differ_from_the_trained(base: Any) -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layers = loaded("model.random_weights=true", "peft=none").model.model.layers
        return layers[0].mlp.up_proj.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert not torch.equal(weight(1), base.model.model.layers[0].mlp.up_proj.weight)


def test_an_error_of_ours_keeps_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    path = asset("pkg://lora_exp/assets/tiny")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"^model.gguf_file: x.gguf of a hub model"):
        tiny(bnb_8bit(6.0), path=str(path), gguf_file="x.gguf", dtype="auto")


def test_weights_that_are_missing_are_never_drawn_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    (lost,) = (key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    kept = weights.pop(lost)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"lack 1 weights, the first is {lost}"):
        loaded("model=local", f"model.path={folder}")
    extra = {lost: kept, "vision.weight": kept.clone()}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    loaded("model=local", f"model.path={folder}")
    assert "have no place in the model, the first is vision.weight" in caplog.text


def test_weights_of_other_sizes_than_the_config_says_are_told(tmp_path: Path) -> None:
    folder = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigError, match=r"12 of its weights .*: \[192, 512\], not \[192, 96\]"):
        loaded("model=local", f"model.path={folder}")


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_base_that_was_saved_quantised_is_refused_with_the_cure(
    tmp_path: Path, quant: str
) -> None:
    folder = tmp_path / "base"
    loaded("quant=nf4").model.save_pretrained(folder)
    loaded().tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"it is quantised \(bitsandbytes\); .* with quant=nf4"):
        loaded("model=local", f"model.path={folder}", f"quant={quant}")


def test_a_new_classification_head_is_no_reason_for_a_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = logging.getLogger("transformers")
    theirs.addHandler(caplog.handler)
    try:
        made = tiny(task_type="SEQ_CLS")
    finally:
        theirs.removeHandler(caplog.handler)
    assert made.model.score.out_features == 1
    assert caplog.text == ""


def test_a_folder_without_a_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"model.path: .* cannot be loaded"):
        loaded("model=local", f"model.path={tmp_path}")
