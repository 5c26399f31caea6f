"""The formula for training memory counts logits only for trainers that compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils

from lora_exp import compose, run
from lora_exp.after.base_bytes import base_bytes
from lora_exp.after.estimate import _step as step_of_config
from lora_exp.after.estimate import model_config, need, skeleton
from lora_exp.algorithm.ppo import PPOConfig, PPOTrainer
from lora_exp.model.loading import Base
from lora_exp.model.memory import peak_bytes, reset_peak
from lora_exp.model.requirement import (
    TILE,
    Step,
    _step,
    loss_bytes,
    state_bytes,
    step_bytes,
    training_bytes,
)
from lora_exp.training.place import Alone
from tests.conftest import QUICK

WITH_ROLLOUTS = [
    "data.rows=32", "data.eval_rows=4", "algorithm.args.max_completion_length=8", "samples.rows=2",
    "algorithm.rewards=[lora_exp.rewards.similarity]", "train.max_steps=1",
]  # fmt: skip
PAIRS = ["data=demo_pairs", "data.rows=32", "data.eval_rows=4", "samples.rows=0"]
PAIRS += ["train.max_steps=1"]
# overrides, and whether the logits of a whole batch are in memory
TRAINERS = [
    (["algorithm=sft", *QUICK], False),
    (["algorithm=sft", *QUICK, "+train.label_smoothing_factor=0.1"], True),
    (["algorithm=dpo", *PAIRS], False),
    (["algorithm=kto", *PAIRS], False),
    (["algorithm=reward", *PAIRS], False),
    (["algorithm=grpo", "data=demo_pairs", *WITH_ROLLOUTS], False),
    (["algorithm=ppo", "data=demo_pairs", *WITH_ROLLOUTS], True),
]
CONFIG = LlamaConfig(
    vocab_size=152_064, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2,
)  # fmt: skip


class ObservingPlace(Alone):
    """A place that records the trainer, and the number of logits that have a gradient."""

    trainer: Any = None
    estimate, logits = 0, 0

    def join(self, trainer: Any) -> None:
        self.trainer, self.estimate = trainer, training_bytes(trainer)
        head = trainer.model.get_base_model().get_output_embeddings()
        if head is not None:
            head.register_forward_hook(self.observe)

    def observe(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            self.logits = max(self.logits, output.shape[0] * output.shape[1])


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize(
    ("overrides", "whole_batch"), TRAINERS, ids=[" ".join(o[:1] + o[-1:]) for o, _ in TRAINERS]
)
def test_logits_are_counted_only_for_trainers_that_compute_them(
    tmp_path: Path, overrides: list[str], whole_batch: bool
) -> None:
    cfg = compose("tracking=none", *overrides)
    place = ObservingPlace()
    run(cfg, tmp_path / "run", place=place)
    step, expected = _step(place.trainer), step_of_config(cfg, model_config(cfg))
    assert bool(place.logits) == whole_batch
    assert place.logits <= step.scored
    assert (step.scored > 0 and not step.tiled) == whole_batch
    assert (loss_bytes(place.trainer) > 0) == (step.scored > 0 and step.tiled)
    # the estimate before a run equals that in it, except that its rows may be shorter
    assert (step.tiled, step.checkpointing) == (expected.tiled, expected.checkpointing)
    assert (step.scored > 0, step.sampled > 0) == (expected.scored > 0, expected.sampled > 0)
    assert step.tokens <= expected.tokens
    assert step.sampled <= expected.sampled
    if (
        cfg.choices.algorithm != "ppo"
    ):  # PPO also trains a value head, which peft's arguments do not contain
        needed = need(cfg, model_config(cfg))
        without_base = needed.total - base_bytes(skeleton(cfg, model_config(cfg)), cfg.quant)
        assert place.estimate <= without_base


def test_a_tile_is_as_large_as_trls() -> None:
    assert TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_a_large_vocabulary_takes_one_tile_of_logits_not_a_batch() -> None:
    tiled = Step(8192, 8192, tiled=True, sampled=0, checkpointing=True)
    untiled = Step(8192, 8192, tiled=False, sampled=0, checkpointing=True)
    difference = step_bytes(CONFIG, untiled) - step_bytes(CONFIG, tiled)
    assert difference > 2 * 4 * 8192 * 152_064  # logits and their gradient
    longer = Step(16384, 16384, tiled=True, sampled=0, checkpointing=True)
    assert step_bytes(CONFIG, longer) < 2 * step_bytes(CONFIG, tiled)  # there is one tile


def test_the_state_of_an_optimiser_depends_on_its_name_and_size() -> None:
    assert state_bytes(10, "adamw_torch_fused", 4) == 80
    assert state_bytes(10, "sgd", 4) == 0
    assert state_bytes(8192, "adamw_8bit", 4) == 2 * 8192


def length_rewards(completions: list[Any], **_: Any) -> list[int]:
    return [len(c) for c in completions]


def test_the_estimate_is_above_the_measured_peak(fresh_base: Base, tmp_path: Path) -> None:
    """For rollouts, whose key-value cache takes more memory than their training steps."""
    model = get_peft_model(fresh_base.model, LoraConfig(r=4, target_modules="all-linear"))
    args = PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8,
        num_minibatches=64, max_completion_length=64, max_steps=2, disable_tqdm=True,
        num_iterations=1, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Repeat: a b c d"}] * 512)
    trainer = PPOTrainer(model, args, rows, None, fresh_base.tokenizer, [length_rewards])
    estimate = training_bytes(trainer)
    reset_peak()
    before = peak_bytes()
    trainer.train()

    assert peak_bytes() - before < estimate
