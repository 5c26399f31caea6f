"""A run that diverges stops, instead of training on with numbers that are none."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from lora_exp.errors import DivergedError


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stop at the first log line whose loss or gradient norm is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Check one line.

        Raises:
            DivergedError: naming the step and the number.
        """
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}; try a lower"
                    " train.learning_rate, more train.warmup_steps or another quant.compute_dtype"
                )
