"""A batch that is one sequence must not be longer than its base can compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig

from lora_exp.errors import ConfigError


@pytest.fixture
def bounded(tmp_path: Path, base: Any) -> list[str]:
    """A base whose causal mask has 96 positions."""
    config = GPTNeoConfig(
        vocab_size=512, hidden_size=32, num_layers=1, num_heads=2, max_position_embeddings=96,
        attention_types=[[["global"], 1]], pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    return ["model=local", f"model.path={tmp_path / 'base'}"]


PACKING = ["algorithm.args.packing=true", "algorithm.args.max_length=96"]
PADDING_FREE = ["+algorithm.args.padding_free=true", "algorithm.args.max_length=null"]


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (PACKING, "give a smaller algorithm.args.max_length, or leave packing out"),
        (PADDING_FREE, "give a smaller batch, or leave padding_free out"),
    ],
    ids=["packing", "padding_free"],
)
def test_batches_longer_than_the_causal_mask_are_refused(
    quick_run: Callable[..., Any], bounded: list[str], overrides: list[str], cure: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        quick_run(*bounded, *overrides, "train.per_device_train_batch_size=5")
    (name, text), *_ = refused.value.faults
    assert name == "train.per_device_train_batch_size"
    assert text.startswith("5 rows of a batch are one sequence, here of up to ")
    assert "GPTNeoForCausalLM computes at most 96; give a smaller batch" in text
    assert text.endswith(cure)


def test_batches_of_one_packed_row_train_on_a_base_with_a_short_causal_mask(
    quick_run: Callable[..., Any], bounded: list[str]
) -> None:
    one = ["train.per_device_train_batch_size=1", "train.per_device_eval_batch_size=1"]
    result = quick_run(*bounded, *PACKING, *one, "samples.rows=0")
    assert result.metrics["eval/loss"] > 0
