"""Callbacks that stop a useless training: NaN or infinite values, tensors without a gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from lora_exp.errors import AdapterError, ConfigError, DivergedError, RewardError
from lora_exp.model.mixture import expert_count

log = logging.getLogger("lora_exp")


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stop at the first log line whose loss or gradient norm is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Check one log line.

        Raises:
            DivergedError: the loss or gradient norm is not finite; it names the step.
            RewardError: since the last line no answer had a reward.
        """
        if "reward" in logs and not _is_finite(logs["reward"]):
            text = "no reward function gave any answer a reward (None) up to step"
            raise RewardError(f"{text} {state.global_step}; nothing can be learnt from that")
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}; try a lower"
                    " train.learning_rate, more train.warmup_steps or another quant.compute_dtype"
                )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def check_stepped(state: Any) -> None:
    """Refuse a training that ended before its first step.

    Raises:
        ConfigError: it made no step.
    """
    if state.global_step == 0:
        text = "training ended without a step: its rows do not fill one"
        raise ConfigError([("data", f"{text}; give more rows, or smaller batches")])


def check_finite(named_parameters: Iterable[tuple[str, Any]], step: int) -> None:
    """Refuse to save weights that are NaN or infinite.

    Raises:
        DivergedError: a trained tensor is not finite; it names the step and the tensor.
    """
    for name, parameter in named_parameters:
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            text = f"{name} is not finite at step {step}; try a lower train.learning_rate"
            raise DivergedError(f"{text}; the checkpoints before it are kept")


class GradientCheck(TrainerCallback):  # type: ignore[misc]
    """Find trained tensors that no gradient reaches: some methods on some bases train nothing.

    A tensor that takes no part in the loss has no gradient in the first step, which is an error.
    A gradient of zero gives a warning in the third step, not before: with a warm-up from rate 0,
    LoRA's B (zero at the start) first changes in the second step, so A first has one in the third.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Check the gradients in the first and in the third step.

        Raises:
            AdapterError: tensors take no part in the loss; it names them.
        """
        if state.global_step not in (0, 2):
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if state.global_step == 0:
            unused = [name for name, p in trained.items() if p.grad is None]
            if unused and expert_count(model.config) is None:
                text = f"{len(unused)} of {len(trained)} trained tensors take no part in the loss"
                more = "" if len(unused) < 6 else f" and {len(unused) - 5} more"
                raise AdapterError(
                    f"{text}: {', '.join(unused[:5])}{more}; leave them out of what is adapted"
                    " (peft.target_modules, peft.modules_to_save), or choose another method"
                )
            return
        unchanged = [n for n, p in trained.items() if p.grad is None or not p.grad.count_nonzero()]
        if unchanged:
            log.warning(
                "%d of %d trained tensors get no gradient and stay as they are: %s",
                len(unchanged), len(trained), ", ".join(unchanged[:3]),
            )  # fmt: skip
