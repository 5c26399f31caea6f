"""A run keeps its newest checkpoints and its best, and deletes no other run's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_exp import compose, run
from lora_exp.training.manifest import seal
from tests.test_experiment import digest, mark_killed
from tests.training.test_checkpoint import SAVING


def test_the_best_checkpoint_survives_rotation_and_a_move(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    best = ["+train.load_best_model_at_end=true", "+train.metric_for_best_model=eval_loss"]
    best += ["+train.greater_is_better=true", "train.eval_strategy=steps", "train.eval_steps=1"]
    settings = [*SAVING, *best, "train.save_total_limit=1", "train.max_steps=4"]
    first = quick_run(*settings, name="first")  # the loss falls: the first step is the "best"
    checkpoints = sorted(path.name for path in (first.directory / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-1"]
    settings[-2] = "train.save_total_limit=2"
    second = quick_run(*settings, name="second")
    weights = "adapter_model.safetensors"
    assert digest(second.saved)[weights] == digest(first.saved)[weights]
    moved = second.directory.rename(tmp_path / "moved")
    checkpoints = sorted(path.name for path in (moved / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    mark_killed(moved)
    resumed = run(compose(f"resume={moved}", "train.max_steps=6"))
    assert (moved / "checkpoints/checkpoint-1").is_dir()
    assert digest(resumed.saved)[weights] == digest(first.saved)[weights]


def test_a_run_keeps_its_own_checkpoints_beside_those_of_others(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    saved = quick_run(*SAVING, name="other").directory / "checkpoints/checkpoint-3"
    foreign = tmp_path / "run/checkpoints/checkpoint-9"
    shutil.copytree(saved, foreign)
    seal(foreign, "another", 9)
    result = quick_run(*SAVING, "train.save_total_limit=1")
    checkpoints = sorted(path.name for path in (result.directory / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-3", "checkpoint-9"]
