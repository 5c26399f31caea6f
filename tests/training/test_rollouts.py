"""Between two rollouts a run goes on with the answers that its checkpoint has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_exp import compose, run
from tests.test_experiment import copied, digest, mark_killed
from tests.training.test_checkpoint import SAVING


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_answers_of_a_rollout_are_part_of_a_checkpoint(algorithm: str, tmp_path: Path) -> None:
    settings = [f"experiment=demo_{algorithm}", "data.rows=8", "data.eval_rows=4"]
    settings += ["train.per_device_train_batch_size=8", "algorithm.args.max_completion_length=8"]
    settings += ["+algorithm.args.num_iterations=2", "+algorithm.args.steps_per_generation=2"]
    settings += [*SAVING, "train.save_total_limit=9", "train.max_steps=6", "samples.rows=4"]
    uninterrupted = run(compose("tracking=none", *settings), tmp_path / "undisturbed")
    cut = copied(uninterrupted, tmp_path / "cut")
    for step in (4, 5, 6):  # step 3 lies within a rollout of four
        shutil.rmtree(cut.directory / f"checkpoints/checkpoint-{step}")
    mark_killed(cut.directory)
    resumed = run(compose(f"resume={cut.directory}"))
    assert digest(resumed.saved) == digest(uninterrupted.saved)
