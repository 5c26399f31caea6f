"""Pass a trainer's metrics to the run's record and to its tracker (W&B or none)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from lora_exp.record.run import Record

OWN_SPEED = ("_runtime", "_per_second", "_preparation_time")


class Tracker(Protocol):
    """The interface of a tracker, which gets a run's metrics in addition to its directory."""

    place: str  # for people: where to look

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of a step."""

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Take the answers before and after training."""

    def finish(self, summary: dict[str, Any], saved: Path | None) -> None:
        """Take the final metrics and the saved folder (None: the run failed), and close."""


class Nowhere:
    """`tracking=none`: metrics go to the run's directory only."""

    place = "none"

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Do nothing: metrics.jsonl has them."""

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Do nothing: samples.jsonl has them."""

    def finish(self, summary: dict[str, Any], saved: Path | None) -> None:
        """Do nothing."""


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Callback: pass log lines to the record and the tracker, as `train/x` and `eval/x`."""

    def __init__(self, record: Record, tracker: Tracker) -> None:
        self.record, self.tracker = record, tracker
        self.seen = (0.0, time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.seen = (0.0, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Pass one log line on; tokens per second are counted since the last line."""
        if "train_runtime" in logs:
            return  # the trainer's closing line: the run's own summary says it
        metrics = named(logs)
        tokens, now = metrics.get("train/num_tokens"), time.perf_counter()
        if tokens is not None:
            metrics["train/tokens_per_s"] = (tokens - self.seen[0]) / (now - self.seen[1])
            self.seen = (tokens, now)
        self.record.log(metrics, state.global_step)
        self.tracker.log(metrics, state.global_step)


def named(logs: dict[str, Any]) -> dict[str, float]:
    """Rename a trainer's metrics to `group/name`, without those about speed."""
    metrics = {}
    for key, value in logs.items():
        if isinstance(value, int | float) and not key.endswith(OWN_SPEED):
            group, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
            metrics[f"{group}/{name}"] = float(value)
    return metrics
