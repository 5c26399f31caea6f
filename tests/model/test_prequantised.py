"""Bases that were saved quantised: read as they are, or dequantised, and saved plainly again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.loading import Base, bnb_4bit, bnb_8bit
from lora_exp.model.quantised import dequantise
from tests.conftest import tiny

NF4, INT8 = bnb_4bit("nf4", True, "auto"), bnb_8bit(6.0)
IDS = torch.tensor([[1, 40, 90, 7]])


def saved(folder: Path, quantization: Any) -> Path:
    """Save the embedded model quantised."""
    base = tiny(quantization)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def with_quantisation(folder: Path, settings: dict[str, Any]) -> Path:
    """Copy the embedded model, and name a quantisation in its config."""
    shutil.copytree(asset("pkg://lora_exp/assets/tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """The embedded model with 8-bit floats and a scale for each block of 128 x 128 weights."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = with_quantisation(tmp_path / "fp8", settings)
    tensors = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        tensors[key] = weight
        if key.endswith("_proj.weight"):
            blocks = [-(-size // 128) for size in weight.shape]
            tensors[key] = (weight * 64).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.full(blocks, 1 / 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(base: Base) -> torch.Tensor:
    found: torch.Tensor = base.model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("quantization", "layer"), [(NF4, Linear4bit), (INT8, Linear8bitLt)])
def test_a_base_saved_by_bitsandbytes_computes_as_one_quantised_while_it_loads(
    tmp_path: Path, quantization: Any, layer: type
) -> None:
    folder = saved(tmp_path / "base", quantization)
    base = tiny(path=str(folder))
    assert type(base.model.model.layers[0].mlp.up_proj) is layer
    method = "nf4" if layer is Linear4bit else "int8"
    assert (base.saved_as, base.held) == (method, f"{method}, as saved")
    assert torch.equal(logits(base), logits(tiny(quantization)))
    again = tiny(quantization, path=str(folder))  # to ask for what it is changes nothing
    assert torch.equal(logits(base), logits(again))
    with pytest.raises(ConfigError, match=rf"^quant: fp4, but the base was saved as {method}; "):
        tiny(bnb_4bit("fp4", True, "auto"), path=str(folder))


def test_a_saved_base_computes_in_the_dtype_of_this_machine(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", bnb_4bit("nf4", True, "float16"))
    base = tiny(path=str(folder))
    linear = base.model.model.layers[0].mlp.up_proj
    assert linear.compute_dtype == torch.bfloat16
    assert base.model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    asked = tiny(bnb_4bit("nf4", True, "float16"), path=str(folder))
    assert asked.model.model.layers[0].mlp.up_proj.compute_dtype == torch.float16


def test_a_saved_base_is_dequantised_into_plain_files(tmp_path: Path) -> None:
    base = tiny(path=str(saved(tmp_path / "base", NF4)))
    model = dequantise(base.model, torch.float32)
    model.save_pretrained(tmp_path / "plain")
    base.tokenizer.save_pretrained(tmp_path / "plain")
    plain = tiny(path=str(tmp_path / "plain"))
    assert plain.form is None
    assert torch.equal(logits(plain), logits(Base(model, None, "", None)))


def test_eight_bit_floats_become_floats_and_stay_so_when_saved(fp8: Path, tmp_path: Path) -> None:
    base = tiny(path=str(fp8))
    assert base.held == "fp8, dequantised"
    assert {weight.dtype for weight in base.model.parameters()} == {torch.float32}
    difference = (logits(base) - logits(tiny())).abs().max()
    assert 0 < difference < 0.2 * logits(base).abs().max()
    base.model.save_pretrained(tmp_path / "plain")
    base.tokenizer.save_pretrained(tmp_path / "plain")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "plain/model.safetensors").values()}
    assert dtypes == {torch.float32}
    assert torch.equal(logits(tiny(path=str(tmp_path / "plain"))), logits(base))


def test_eight_bit_floats_are_quantised_otherwise_through_a_cached_copy(fp8: Path) -> None:
    base = tiny(NF4, path=str(fp8))
    assert isinstance(base.model.model.layers[0].mlp.up_proj, Linear4bit)
    assert base.held is None  # the run's own quantisation is what it has
    assert torch.equal(logits(base), logits(tiny(NF4, path=str(fp8))))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_transformers_cannot_read_is_one_line_with_the_way_out(
    tmp_path: Path, method: str
) -> None:
    folder = with_quantisation(tmp_path / "base", {"quant_method": method, "bits": 4})
    text = (
        rf"^model.path: .* it is quantised \({method}\), .*pip install .*original, with quant=nf4"
    )
    with pytest.raises(ConfigError, match=text):
        tiny(path=str(folder))


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("peft=none", "none trains every weight, but int8 weights cannot be trained; take the"),
        ("peft=dora", "dora on int8: .*; take the base's unquantised original, with quant=nf4"),
        ("peft=pissa", "pissa on int8: .*; take the base's unquantised original, with quant=none"),
    ],
)
def test_a_method_that_a_saved_quantisation_excludes_is_refused(
    tmp_path: Path, method: str, text: str
) -> None:
    folder = saved(tmp_path / "base", INT8)
    cfg = compose(method, "model=local", f"model.path={folder}")
    with pytest.raises(ConfigError, match=f"^peft: {text}"):
        attach(tiny(path=str(folder)), cfg, tmp_path)
