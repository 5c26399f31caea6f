"""The value: near nothing at first, and a classifier of one label when it is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from lora_exp import compose, run
from lora_exp.algorithm.critic import Value
from tests.algorithm.test_algorithms import words


def test_values_begin_near_nothing_and_yet_pass_gradients() -> None:
    torch.manual_seed(0)
    value = Value(None, 192, torch.device("cpu"))
    hidden = torch.randn(64, 192, requires_grad=True)
    found = value.score(hidden)
    assert found.abs().max() < 0.01
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 0


def test_a_whole_value_is_usable_alone(tmp_path: Path) -> None:
    result = run(compose(*words("ppo", "peft=none")), tmp_path / "run")
    value = AutoModelForSequenceClassification.from_pretrained(result.directory / "value")
    assert value.config.num_labels == 1
    assert not any("ppo_value" in key for key in _keys(result.saved))


def _keys(folder: Path) -> list[str]:
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:  # type: ignore[no-untyped-call]
        return list(file.keys())
