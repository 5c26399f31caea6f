"""A resumed training follows its new arguments: its intervals, and the rate of its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lora_exp import compose, run


def test_on_resume_logging_saving_and_evaluation_follow_the_new_overrides(
    quick_run: Callable[..., Any],
) -> None:
    saving = ["samples.rows=0", "train.save_strategy=steps", "train.save_total_limit=9"]
    every_third_step = ["train.eval_strategy=steps", "train.eval_steps=3", "train.logging_steps=3"]
    first = quick_run(*saving, *every_third_step, "train.save_steps=3", "train.max_steps=3")
    overrides = ["train.logging_steps=2", "train.save_steps=1", "train.eval_steps=2"]
    run(compose(f"resume={first.directory}", "train.max_steps=6", *overrides))
    text = (first.directory / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["step"] > 3]
    assert {line["step"] for line in lines if "train/loss" in line} >= {4, 6}
    assert {line["step"] for line in lines if "eval/loss" in line} >= {4, 6}
    names = {path.name for path in (first.directory / "checkpoints").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}


def test_a_longer_training_begins_with_the_rate_of_its_own_schedule(
    quick_run: Callable[..., Any],
) -> None:
    settings = ["samples.rows=0", "train.eval_strategy=no", "train.logging_steps=1"]
    settings += ["train.learning_rate=4e-3", "train.warmup_steps=0"]
    first = quick_run(*settings, "train.max_steps=3")
    weights = first.saved / "adapter_model.safetensors"
    before = weights.read_bytes()
    run(compose(f"resume={first.directory}", "train.max_steps=4"))
    assert weights.read_bytes() != before  # at a rate of 0 the step would change nothing
    text = (first.directory / "metrics.jsonl").read_text()
    rates = [line.get("train/learning_rate") for line in map(json.loads, text.splitlines())]
    # cosine: half of (1 + cos(3/4 pi)); the rate at the end of the first training is 0
    assert [rate for rate in rates if rate is not None][-1] == pytest.approx(4e-3 * 0.14644661)
