"""Norms of updates, by hand; against peft's in after/test_inspection.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_exp.adapter.updates import modules, norms


def test_a_hand_worked_norm() -> None:
    weights = {
        "base_model.model.a.lora_A.weight": torch.tensor([[3.0, 4.0]]),
        "base_model.model.a.lora_B.bias": torch.tensor([7.0, 0.0]),
        "base_model.model.a.lora_B.weight": torch.tensor([[1.0], [0.0]]),
        "base_model.model.b.ia3_l": torch.tensor([4.0, 5.0]),  # 1 changes nothing
    }
    first, second = modules(weights, {"lora_alpha": 2})
    assert first == {"name": "a", "r": 1, "lora_alpha": 2, "norm": 10}
    assert second == {"name": "b", "norm": 5}


def test_a_saved_adapters_norms_are_those_of_its_modules(tmp_path: Path) -> None:
    weights = {
        "base_model.model.a.lora_A.weight": torch.tensor([[3.0, 4.0]]),
        "base_model.model.a.lora_B.weight": torch.tensor([[1.0], [0.0]]),
        "base_model.model.b.lora_A.weight": torch.tensor([[torch.inf]]),
        "base_model.model.b.lora_B.weight": torch.tensor([[1.0]]),
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    assert norms(tmp_path) == {"a": 5.0, "b": None}
