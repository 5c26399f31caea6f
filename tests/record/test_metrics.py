"""Log lines of a trainer are passed to the record and to tracking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lora_exp.record.clock import Clock
from lora_exp.record.metrics import Metrics, grouped_metrics


def test_metrics_are_named_by_group() -> None:
    logs = {"loss": 1, "eval_loss": 2.0, "grad_norm": 0.5, "note": "x", "eval_runtime": 3.0}
    assert grouped_metrics(logs) == {"train/loss": 1.0, "eval/loss": 2.0, "train/grad_norm": 0.5}


class RecordedLogs:
    """A record or trackers that keep what is logged to it."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((metrics, step))


def test_metrics_are_logged_to_record_and_tracking_except_the_final_summary() -> None:
    record, tracker = RecordedLogs(), RecordedLogs()
    clock, tokens = Clock(), [500]  # a trainer that resumed
    clock.count = lambda: tokens[0]
    callback: Any = Metrics(record, tracker, clock)  # type: ignore[arg-type]
    callback.on_train_begin(None, None, None)
    tokens[0] = 510
    state = SimpleNamespace(global_step=3)
    callback.on_log(None, state, None, {"loss": 2.0, "num_tokens": 510})
    callback.on_log(None, state, None, {"train_runtime": 1.0, "train_loss": 2.0})
    ((metrics, step),) = record.lines
    assert tracker.lines == [(metrics | {"train/global_step": 3}, 3)]
    assert metrics["train/tokens"] == 510  # of the whole run
    assert (metrics["train/loss"], step) == (2.0, 3)
    assert metrics["train/tokens_per_s"] > 0


def test_the_last_step_is_always_logged() -> None:
    callback: Any = Metrics(RecordedLogs(), RecordedLogs(), Clock())  # type: ignore[arg-type]
    for step, logged in ((4, False), (5, True)):
        control = SimpleNamespace(should_log=False)
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=5), control)
        assert control.should_log is logged


def test_what_is_measured_before_training_is_no_point_of_the_evaluations_chart() -> None:
    record, trackers = RecordedLogs(), RecordedLogs()
    callback: Any = Metrics(record, trackers, Clock())  # type: ignore[arg-type]
    callback.on_log(None, SimpleNamespace(global_step=0), None, {"eval_loss": 7.0})
    assert record.lines == [({"eval/loss": 7.0}, 0)]
    assert trackers.lines == [({"before/loss": 7.0, "train/global_step": 0}, 0)]
