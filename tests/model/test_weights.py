"""Weights: all are read or the base is refused; random weights; reports of missing ones."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from tests.conftest import tiny
from tests.model.test_loading import load_base


def test_random_weights_follow_the_seed_and_differ_from_the_trained(base: Any) -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layers = load_base("model.random_weights=true", "peft=none").model.model.layers
        return layers[0].mlp.up_proj.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert not torch.equal(weight(1), base.model.model.layers[0].mlp.up_proj.weight)


def test_missing_weights_are_never_initialized_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    (missing,) = (key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    weight = weights.pop(missing)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"lack 1 weights, the first is {missing}"):
        load_base("model=local", f"model.path={folder}")
    extra = {missing: weight, "vision.weight": weight.clone()}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    load_base("model=local", f"model.path={folder}")
    assert "have no place in the model, the first is vision.weight" in caplog.text


def test_weights_whose_sizes_differ_from_the_config_are_an_error(tmp_path: Path) -> None:
    folder = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigError, match=r"12 of its weights .*: \[192, 512\], not \[192, 96\]"):
        load_base("model=local", f"model.path={folder}")


def test_an_adapter_beside_the_weights_is_not_put_on_the_base(tmp_path: Path) -> None:
    folder = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny().model, config).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"model.path: .* there is an adapter too"):
        tiny(path=str(folder))


def test_a_new_classification_head_is_not_reported_as_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        base = tiny(task_type="SEQ_CLS")
    finally:
        logger.removeHandler(caplog.handler)
    assert base.model.score.out_features == 1
    assert caplog.text == ""
