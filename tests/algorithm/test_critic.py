"""The critic: its first values are near 0; saved, it is a classifier of one label."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from lora_exp import compose, run
from lora_exp.algorithm.critic import Critic
from tests.algorithm.test_algorithms import overrides_for


def test_values_start_near_zero_and_still_pass_gradients() -> None:
    torch.manual_seed(0)
    critic = Critic(None, 192, torch.device("cpu"))
    hidden = torch.randn(64, 192, requires_grad=True)
    values = critic.score(hidden)
    assert values.abs().max() < 0.01
    values.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 0


def test_a_fully_trained_critic_can_be_used_alone(tmp_path: Path) -> None:
    result = run(compose(*overrides_for("ppo", "peft=none")), tmp_path / "run")
    critic = AutoModelForSequenceClassification.from_pretrained(result.directory / "value")
    assert critic.config.num_labels == 1
    assert not any("ppo_value" in key for key in _keys(result.saved))


def _keys(folder: Path) -> list[str]:
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:  # type: ignore[no-untyped-call]
        return list(file.keys())
