"""A training that cannot succeed is stopped or warned about, with its step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.errors import AdapterError, ConfigError, DivergedError, RewardError
from lora_exp.training.guards import FiniteLoss, GradientCheck, check_finite, check_stepped


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_an_error_names_the_step_and_the_metric(name: str) -> None:
    state = SimpleNamespace(global_step=7)
    args = SimpleNamespace(fp16=False)
    FiniteLoss().on_log(args, state, None, {name: 1.0})
    with pytest.raises(DivergedError, match=f"{name} is nan at step 7; try a lower"):
        FiniteLoss().on_log(args, state, None, {name: math.nan})


def test_in_float16_scaled_gradients_may_overflow_until_the_scale_is_1() -> None:
    args, check = SimpleNamespace(fp16=True), FiniteLoss()

    def log(step: int, norm: float) -> None:
        check.on_log(args, SimpleNamespace(global_step=step), None, {"loss": 1, "grad_norm": norm})

    for step in range(1, 17):
        log(step, math.inf)
    log(17, 2.0)
    log(18, math.inf)
    log(33, math.nan)
    with pytest.raises(DivergedError, match="grad_norm is inf at step 34"):
        log(34, math.inf)
    with pytest.raises(DivergedError, match="loss is nan at step 1"):
        FiniteLoss().on_log(args, SimpleNamespace(global_step=1), None, {"loss": math.nan})


def test_weights_that_are_not_finite_are_named() -> None:
    names = ("frozen", "first", "second")
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in names}
    parameters["frozen"].requires_grad_(False).fill_(math.inf)
    check_finite(parameters.items(), 3)
    parameters["second"].data[1] = math.nan
    with pytest.raises(DivergedError, match="second is not finite at step 3"):
        check_finite(parameters.items(), 3)


@pytest.mark.parametrize("value", [None, math.nan])
def test_rewards_that_are_all_none_end_the_training(value: float | None) -> None:
    state = SimpleNamespace(global_step=2)
    FiniteLoss().on_log(None, state, None, {"reward": 0.0, "eval_reward": None})
    with pytest.raises(RewardError, match=r"gave any answer a reward \(None\) up to step 2"):
        FiniteLoss().on_log(None, state, None, {"reward": value})


def test_a_training_without_a_step_is_an_error() -> None:
    check_stepped(SimpleNamespace(global_step=1))
    with pytest.raises(ConfigError, match="ended without a step"):
        check_stepped(SimpleNamespace(global_step=0))


def test_a_run_that_diverges_stops_with_an_error(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"is (nan|inf) at step \d+; try a lower"):
        quick_run(
            "train.learning_rate=1e30", "train.max_steps=20", "train.logging_steps=1",
            "train.max_grad_norm=0", "train.warmup_steps=0",
        )  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "diverged"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_tensor_outside_the_loss_is_an_error_and_zero_gradients_are_a_warning(
    fresh_base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = attach(fresh_base, compose("targets=qv"), tmp_path).model

    def check(step: int) -> None:
        GradientCheck().on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None, model)

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for step in (0, 1, 2):
        check(step)
    assert not caplog.text
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad.zero_()
    check(0)
    check(2)
    assert "1 of 16 trained tensors get no gradient" in caplog.text
    first.grad = None
    with pytest.raises(AdapterError, match=r"1 of 16 .* no part in the loss: .*q_proj.lora_A"):
        check(0)


def test_gradients_that_a_step_has_removed_are_looked_at_as_they_come() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in "abc"})
    model.config = LlamaConfig()
    args, check = SimpleNamespace(deepspeed={"zero_optimization": {}}), GradientCheck()

    def step(number: int, *names: str) -> None:
        state = SimpleNamespace(global_step=number)
        check.on_step_begin(args, state, None)
        sum(model[name](torch.ones(1, 1)) for name in names).backward()
        for parameter in model.parameters():
            parameter.grad = None
        check.on_pre_optimizer_step(args, state, None, model)

    check.on_train_begin(args, None, None, model)
    step(0, "a", "b", "c")
    with pytest.raises(AdapterError, match=r"1 of 3 trained tensors take no part .*: b\.weight"):
        step(0, "a", "c")
    check.on_step_begin(args, SimpleNamespace(global_step=3), None)
    assert not check.hooks
