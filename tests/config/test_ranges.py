"""Numbers out of range and invalid names are refused by their key, within a time limit."""

from __future__ import annotations

import time

import pytest

from tests.config.test_validation import faults


@pytest.mark.parametrize(
    "override",
    [
        "peft.r=-1",
        "peft.lora_alpha=0",
        "peft.lora_alpha=-2",
        "peft.lora_dropout=1",
        "peft.rank_pattern={q_proj: 0}",
        "peft.rank_pattern={q_proj: 2.5}",
        "peft.alpha_pattern={q_proj: 0}",
        "peft.alpha_pattern={q_proj: high}",
        "peft.lora_dropout=-0.1",
        "train.learning_rate=0",
        "train.learning_rate=-1",
        "train.learning_rate=.nan",
        "train.learning_rate=.inf",
        "train.max_steps=0",
        "train.num_train_epochs=0",
        "train.per_device_train_batch_size=0",
        "train.gradient_accumulation_steps=0",
        "samples.rows=-1",
        "samples.max_new_tokens=0",
        "data.max_rows=0",
        "data.eval_share=1.0",
        "data.num_proc=0",
        "data.num_proc=all",
        "seed=1.5",
        "seed=4294967296",
        "seed=true",
        "samples.rows=2.5",
        "train.per_device_eval_batch_size=0",
        "train.logging_steps=0",
        "train.save_steps=2.5",
        "train.eval_steps=1.5",
        "data.on_error=ignore",
        "name=../../x",
        "name=/absolute",
        "report=../report.html",
        "report=report.pdf",
        "report=true",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(override: str) -> None:
    start = time.perf_counter()
    assert list(faults(override)) == [override.partition("=")[0]]
    assert time.perf_counter() - start < 2


def test_a_name_of_300_characters_is_refused() -> None:
    assert list(faults(f"name={'x' * 300}")) == ["name"]
