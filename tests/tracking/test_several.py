"""Several trackers at once: none of them stops or changes the training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_exp.errors import ConfigError
from lora_exp.tracking.several import Several


class Drawing:
    """A tracker that draws at random, as libraries do for names, and fails where asked to."""

    label, place = "Drawing", "here"

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at, self.calls = fails_at, []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self.calls.append(name)
            random.random(), np.random.rand()
            if name == self.fails_at:
                raise ConnectionError("the server\nis gone")

        return call


def test_a_tracker_that_fails_gets_nothing_more_and_the_others_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, whole = Drawing("log"), Drawing()
    trackers = Several({"broken": lambda: broken, "whole": lambda: whole})
    trackers.log({"train/loss": 1.0}, 1)
    trackers.samples([{"prompt": "a"}], 1)
    trackers.finish({}, None, "finished")
    assert broken.calls == ["log"]
    assert whole.calls == ["log", "samples", "finish"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "broken gets nothing more of this run: ConnectionError: the server is gone"
    )


def test_what_a_tracker_draws_does_not_change_the_run() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    trackers = Several({"drawing": lambda: Drawing("describe")})
    trackers.describe({})
    trackers.finish({}, None, "finished")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_setting_that_the_user_can_mend_is_an_error_and_earlier_trackers_are_closed() -> None:
    first = Drawing()

    def refused() -> Any:
        raise ConfigError([("tracking", "no key")])

    with pytest.raises(ConfigError, match="no key"):
        Several({"first": lambda: first, "second": refused})
    assert first.calls == ["finish"]


def test_a_run_whose_tracker_cannot_be_created_is_trained_and_has_the_same_bytes(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / "file").write_text("")
    alone = quick_run("samples.rows=0", name="alone")
    folder = f"tracking.tensorboard.folder={tmp_path / 'file'}"
    tracked = quick_run("tracking=[tensorboard]", folder, "samples.rows=0", name="tracked")
    weights = "adapter/adapter_model.safetensors"
    assert (tracked.directory / weights).read_bytes() == (alone.directory / weights).read_bytes()
    record = json.loads((tracked.directory / "run.json").read_text())
    assert record["status"] == "finished"
