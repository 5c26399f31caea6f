"""Pass a trainer's metrics to the run's record and to its trackers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lora_exp.record.clock import Clock
from lora_exp.record.run import Record
from lora_exp.tracking.several import Several

TRAINER_SPEED = ("_runtime", "_per_second", "_preparation_time")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Callback: pass log lines to the record and the tracker, as `train/x` and `eval/x`."""

    def __init__(self, record: Record, trackers: Several, clock: Clock) -> None:
        self.record, self.trackers, self.clock = record, trackers, clock
        self.logged = (0, 0.0)  # the tokens and seconds of the last log line

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.clock.begin()
        self.logged = (0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last step, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Pass one log line on; tokens per second are counted since the last line."""
        if "train_runtime" in logs:
            return  # the trainer's last line: the run's own summary has these numbers
        metrics = grouped_metrics(logs)
        tokens, seconds = self.clock.tokens, self.clock.seconds
        if self.clock.all_tokens and "train/loss" in metrics:
            metrics["train/tokens"] = float(self.clock.all_tokens)
            if tokens > self.logged[0]:  # not between two rollouts
                speed = (tokens - self.logged[0]) / (seconds - self.logged[1])
                metrics["train/tokens_per_s"] = speed
                self.logged = (tokens, seconds)
        step = state.global_step
        self.record.log(metrics, step)
        if step == 0:  # in a chart of losses the base's would squeeze all others
            metrics = {name.replace("eval/", "before/", 1): n for name, n in metrics.items()}
        self.trackers.log(metrics | {"train/global_step": step}, step)


def grouped_metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Rename a trainer's metrics to `group/name`, without those about speed."""
    metrics = {}
    for key, value in logs.items():
        if isinstance(value, int | float) and not key.endswith(TRAINER_SPEED):
            group, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
            metrics[f"{group}/{name}"] = float(value)
    return metrics
