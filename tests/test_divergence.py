"""A loss or a gradient that is no number ends the run, and says where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_exp.divergence import FiniteLoss
from lora_exp.errors import DivergedError


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_step_and_the_number_are_named(name: str) -> None:
    state = SimpleNamespace(global_step=7)
    FiniteLoss().on_log(None, state, None, {name: 1.0})
    with pytest.raises(DivergedError, match=f"{name} is nan at step 7; try a lower"):
        FiniteLoss().on_log(None, state, None, {name: math.nan})


def test_a_run_that_diverges_stops_and_says_so(
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
