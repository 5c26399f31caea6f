"""What a resumed training takes from its arguments instead of from the checkpoint."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback


class Resumption(TrainerCallback):  # type: ignore[misc]
    """Callback: the intervals and the schedule of the arguments, not those of the checkpoint."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Set the steps between two logs, saves and evaluations, and the next step's rate."""
        state.compute_steps(args, state.max_steps)
        if isinstance(lr_scheduler, LambdaLR):
            _follow(lr_scheduler)


def _follow(scheduler: LambdaLR) -> None:
    """Set the rate of a scheduler's next step: a checkpoint's is that of the shorter schedule.

    After the last step of a decaying schedule it is 0, and the first step would change nothing.
    """
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in pairs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
