"""A run's peak is its own, not that of the run before it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from lora_exp.algorithm.ppo import PPOConfig, PPOTrainer
from lora_exp.model.loading import Base
from lora_exp.model.memory import peak_bytes, reset_peak, training_bytes


def lengths(completions: list[Any], **_: Any) -> list[int]:
    return [len(c) for c in completions]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_is_forgotten_and_found_again() -> None:
    reset_peak()
    low = peak_bytes()
    block = torch.ones(64, 2**20)
    high = peak_bytes()
    del block
    reset_peak()
    assert high - low > 200 * 2**20
    assert peak_bytes() < high


def test_a_runs_estimate_is_above_what_it_takes(fresh_base: Base, tmp_path: Path) -> None:
    """Of a rollout, whose keys and values weigh more than what its steps keep."""
    model = get_peft_model(fresh_base.model, LoraConfig(r=4, target_modules="all-linear"))
    args = PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8,
        num_minibatches=64, max_completion_length=64, max_steps=2, disable_tqdm=True,
        num_iterations=1, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Repeat: a b c d"}] * 512)
    trainer = PPOTrainer(model, args, rows, None, fresh_base.tokenizer, [lengths])
    estimate = training_bytes(trainer)
    reset_peak()
    before = peak_bytes()
    trainer.train()

    assert peak_bytes() - before < estimate
