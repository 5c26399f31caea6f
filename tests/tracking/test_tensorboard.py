"""TensorBoard's event files, read with its own reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")


def test_event_files_hold_metrics_samples_and_hyperparameters(
    quick_run: Callable[..., Any],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    result = quick_run("tracking=[tensorboard]", "train.logging_steps=1", "peft.r=4")
    events = EventAccumulator(str(result.directory / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(losses) == [1, 2, 3]
    assert losses[3] == pytest.approx(result.metrics["train/loss"])
    (before,) = events.Scalars("before/loss")
    assert before.step == 0
    assert [event.step for event in events.Scalars("eval/loss")] == [3]
    (trainable,) = events.Scalars("summary/trainable_parameters")
    assert trainable.value > 0
    (samples,) = events.Tensors("samples/text_summary") if (
        "samples/text_summary" in events.Tags()["tensors"]
    ) else events.Tensors("samples")  # fmt: skip
    assert samples.tensor_proto.string_val[0].startswith(b"|prompt|task|expected|before|after|")
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    start = metadata.parse_session_start_info_plugin_data(plugin.content)
    assert start.hparams["peft.r"].number_value == 4
    assert start.hparams["run.place"].string_value == "alone"
