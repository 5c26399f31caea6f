"""What inspect says of files is what they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_exp import load_adapter
from lora_exp.after.inspection import inspect, modules
from lora_exp.errors import SavedError
from tests.test_after_saved import copied

Trained = Callable[..., Path]


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_norms_are_those_of_the_updates_that_peft_makes(trained: Trained, method: str) -> None:
    run = trained(
        f"peft={method}", "+peft.rank_pattern={q_proj:4}", "+peft.alpha_pattern={q_proj:2}"
    )
    model, _ = load_adapter(run)
    found = {module["name"]: module for module in inspect(run)["modules"]}
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        norm = float(layer.get_delta_weight("default").norm())
        assert math.isclose(found[name]["norm"], norm, rel_tol=1e-4)
        assert found[name]["r"] == layer.r["default"]
    assert {module["r"] for module in found.values()} == {4, 16}


def test_a_hand_worked_norm() -> None:
    weights = {
        "base_model.model.a.lora_A.weight": torch.tensor([[3.0, 4.0]]),
        "base_model.model.a.lora_B.weight": torch.tensor([[1.0], [0.0]]),
        "base_model.model.b.ia3_l": torch.tensor([6.0, 8.0]),
    }
    first, second = modules(weights, {"lora_alpha": 2})
    assert first == {"name": "a", "r": 1, "lora_alpha": 2, "norm": 10}
    assert second == {"name": "b", "norm": 10}


def test_an_adapter_tells_method_base_size_and_run(trained: Trained) -> None:
    run = trained("peft=dora", "quant=nf4")
    found = inspect(run)
    assert found["kind"] == "adapter"
    assert found["method"] == "LORA"
    assert found["settings"]["use_dora"] is True
    assert found["base"] == "pkg://lora_exp/assets/tiny"
    assert found["base_revision"].startswith("sha256:")
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    assert found["files"][file.name] == file.stat().st_size
    assert found["dtypes"] == ["float32"]
    assert found["finite"] is True
    assert found["run"]["status"] == "finished"
    assert found["run"]["choices"]["quant"] == "nf4"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "ln_tuning", "prompt_tuning"])
def test_every_method_can_be_looked_at(trained: Trained, method: str) -> None:
    found = inspect(trained(f"peft={method}"))
    assert found["modules"]
    assert all(module["norm"] > 0 for module in found["modules"])


def test_a_whole_model_and_a_sweep(trained: Trained, tmp_path: Path) -> None:
    found = inspect("lora_exp/assets/tiny")
    model, _ = load_adapter("lora_exp/assets/tiny")
    assert found["kind"] == "model"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    for number, run in enumerate([trained("peft=lora"), trained("peft=rslora")]):
        copied(run, tmp_path / "sweep" / str(number))
    sweep = inspect(tmp_path / "sweep")
    assert [job["status"] for job in sweep["jobs"]] == ["finished"] * 2
    assert all(job["value"] is not None for job in sweep["jobs"])


def test_a_damaged_file_is_told(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SavedError, match="its weights are damaged"):
        inspect(run)
