"""Callbacks that stop a useless training: NaN or infinite values, tensors without a gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from lora_exp.errors import AdapterError, ConfigError, DivergedError, RewardError
from lora_exp.model.mixture import expert_count
from lora_exp.model.sharded import own_part
from lora_exp.parallel.world import world

log = logging.getLogger("lora_exp")


HALVINGS = 16  # of the scale of gradients in float16, which begins at 2**16: then it is 1


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stop at the first log line whose loss or gradient norm is not finite.

    In float16 gradients are scaled. If that makes them infinite, the step is left out and the scale
    halved: the gradients themselves are infinite only if they still are after `HALVINGS` steps.
    """

    def __init__(self) -> None:
        self.overflowing_since: int | None = None  # the step

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
                if name == "grad_norm" and self._may_recover(args, state.global_step):
                    continue
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}; try a lower"
                    " train.learning_rate, more train.warmup_steps or another quant.compute_dtype"
                )
        if "grad_norm" in logs and math.isfinite(logs["grad_norm"]):
            self.overflowing_since = None

    def _may_recover(self, args: Any, step: int) -> bool:
        """Return whether an infinite norm may be that of scaled gradients only."""
        if self.overflowing_since is None:
            self.overflowing_since = step
        return bool(args.fp16) and step - self.overflowing_since < HALVINGS


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
    trained = {name: p for name, p in named_parameters if p.requires_grad}
    finite = _each([torch.isfinite(own_part(p)).all() for p in trained.values()])
    infinite = [name for name, is_finite in zip(trained, finite, strict=True) if not is_finite]
    for name in (name for names in world.gathered(infinite) for name in names):
        text = f"{name} is not finite at step {step}; try a lower train.learning_rate"
        raise DivergedError(f"{text}; the checkpoints before it are kept")


def _each(conditions: list[torch.Tensor]) -> list[bool]:
    """Return conditions that are computed on a device; it is waited for once."""
    values: list[bool] = torch.stack(conditions).tolist() if conditions else []
    return values


def check_alike(parameters: Iterable[Any], step: int) -> None:
    """Refuse to go on if the processes of a run no longer train the same weights.

    Raises:
        DivergedError: they differ; nothing is saved of them.
    """
    if world.size == 1:
        return
    trained = (p.detach() for p in parameters if p.requires_grad)
    sums = [p.double().sum().item() for p in trained if own_part(p) is p]  # of others no copies
    if any(others != sums for others in world.gathered(sums)):
        text = f"the processes of the run have different weights at step {step}: gradients were not"
        raise DivergedError(f"{text} averaged over all of them; give parallel=none")


class GradientCheck(TrainerCallback):  # type: ignore[misc]
    """Find trained tensors that no gradient reaches: some methods on some bases train nothing.

    A tensor that takes no part in the loss has no gradient in the first step, which is an error.
    A gradient of zero gives a warning in the third step, not before: with a warm-up from rate 0,
    LoRA's B (zero at the start) first changes in the second step, so A first has one in the third.
    """

    def __init__(self) -> None:
        self.hooked: dict[str, torch.Tensor] = {}  # whether a gradient is not 0, by its tensor
        self.hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Look at the gradients of DeepSpeed as they come: it has removed them at the check."""
        if args.deepspeed:
            trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            self.hooks = [p.register_hook(partial(self._see, name)) for name, p in trained]

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        self.hooked[name] = gradient.any() | self.hooked.get(name, False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the gradients of earlier steps; after the third none is looked at."""
        self.hooked.clear()
        if state.global_step > 2:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []

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
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        gradients |= self.hooked
        if state.global_step == 0:
            unused = [name for name in trained if name not in gradients]
            if unused and expert_count(model.config) is None:
                text = f"{len(unused)} of {len(trained)} trained tensors take no part in the loss"
                more = "" if len(unused) < 6 else f" and {len(unused) - 5} more"
                raise AdapterError(
                    f"{text}: {', '.join(unused[:5])}{more}; leave them out of what is adapted"
                    " (peft.target_modules, peft.modules_to_save), or choose another method"
                )
            return
        changes = _each([own_part(gradient).any() for gradient in gradients.values()])
        changed = {name for name, any_ in zip(gradients, changes, strict=True) if any_}
        changed = set().union(*world.gathered(changed))  # each may have a part of a gradient
        unchanged = [name for name in trained if name not in changed]
        if unchanged:
            log.warning(
                "%d of %d trained tensors get no gradient and stay as they are: %s",
                len(unchanged), len(trained), ", ".join(unchanged[:3]),
            )  # fmt: skip
