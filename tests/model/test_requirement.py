"""What training takes is one formula, and counts logits only of trainers that make them."""

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
from lora_exp.after.estimate import _step as step_of_config
from lora_exp.after.estimate import base_bytes, model_config, need, skeleton
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

DRAWN = [
    "data.rows=32", "data.eval_rows=4", "algorithm.args.max_completion_length=8", "samples.rows=2",
    "algorithm.rewards=[lora_exp.rewards.similarity]", "train.max_steps=1",
]  # fmt: skip
PAIRS = ["data=demo_pairs", "data.rows=32", "data.eval_rows=4", "samples.rows=0"]
PAIRS += ["train.max_steps=1"]
# overrides -> whether all words' logits are made of whole batches
TRAINERS = [
    (["algorithm=sft", *QUICK], False),
    (["algorithm=sft", *QUICK, "+train.label_smoothing_factor=0.1"], True),
    (["algorithm=dpo", *PAIRS], False),
    (["algorithm=kto", *PAIRS], False),
    (["algorithm=reward", *PAIRS], False),
    (["algorithm=grpo", "data=demo_pairs", *DRAWN], False),
    (["algorithm=ppo", "data=demo_pairs", *DRAWN], True),
]
CONFIG = LlamaConfig(
    vocab_size=152_064, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2,
)  # fmt: skip


class Watched(Alone):
    """A place that looks at the trainer, and at the logits that are made with a way back."""

    trainer: Any = None
    taken, made = 0, 0

    def join(self, trainer: Any) -> None:
        self.trainer, self.taken = trainer, training_bytes(trainer)
        head = trainer.model.get_base_model().get_output_embeddings()
        if head is not None:
            head.register_forward_hook(self.look)

    def look(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            self.made = max(self.made, output.shape[0] * output.shape[1])


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize(
    ("overrides", "logits"), TRAINERS, ids=[" ".join(o[:1] + o[-1:]) for o, _ in TRAINERS]
)
def test_logits_are_counted_of_the_trainers_that_make_them(
    tmp_path: Path, overrides: list[str], logits: bool
) -> None:
    cfg = compose("tracking=none", *overrides)
    place = Watched()
    run(cfg, tmp_path / "run", place=place)
    step, told = _step(place.trainer), step_of_config(cfg, model_config(cfg))
    assert bool(place.made) == logits
    assert place.made <= step.scored
    assert (step.scored > 0 and not step.tiled) == logits
    assert (loss_bytes(place.trainer) > 0) == (step.scored > 0 and step.tiled)
    # before the run as in it, but for rows that are shorter than they may be
    assert (step.tiled, step.checkpointing) == (told.tiled, told.checkpointing)
    assert (step.scored > 0, step.sampled > 0) == (told.scored > 0, told.sampled > 0)
    assert step.tokens <= told.tokens
    assert step.sampled <= told.sampled
    if cfg.choices.algorithm != "ppo":  # whose value trains too, which is no argument of peft's
        found = need(cfg, model_config(cfg))
        beside = found.total - base_bytes(skeleton(cfg, model_config(cfg)), cfg.quant)
        assert place.taken <= beside


def test_a_tile_is_as_large_as_trls() -> None:
    assert TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_a_large_vocabulary_takes_a_tile_and_not_a_batch_of_logits() -> None:
    tiled = Step(8192, 8192, tiled=True, sampled=0, checkpointing=True)
    whole = Step(8192, 8192, tiled=False, sampled=0, checkpointing=True)
    apart = step_bytes(CONFIG, whole) - step_bytes(CONFIG, tiled)
    assert apart > 2 * 4 * 8192 * 152_064  # logits and their gradient
    longer = Step(16384, 16384, tiled=True, sampled=0, checkpointing=True)
    assert step_bytes(CONFIG, longer) < 2 * step_bytes(CONFIG, tiled)  # there is one tile


def test_what_an_optimiser_keeps_is_by_its_name_and_size() -> None:
    assert state_bytes(10, "adamw_torch_fused", 4) == 80
    assert state_bytes(10, "sgd", 4) == 0
    assert state_bytes(8192, "adamw_8bit", 4) == 2 * 8192


def lengths(completions: list[Any], **_: Any) -> list[int]:
    return [len(c) for c in completions]


def test_a_runs_estimate_is_above_what_it_takes(fresh_base: Base, tmp_path: Path) -> None:
    """Of a rollout, whose keys and values weigh more than what its steps keep."""
    model = get_peft_model(fresh_base.model, LoraConfig(r=4, target_modules="all-linear"))
    args = PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8,
        num_minibatches=64, max_completion_length=64, max_steps=2, disable_tqdm=True,
        num_iterations=1, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Repeat: a b c d"}] * 512)
    trainer = PPOTrainer(model, args, rows, None, fresh_base.tokenizer, [lengths])
    estimate = training_bytes(trainer)
    reset_peak()
    before = peak_bytes()
    trainer.train()

    assert peak_bytes() - before < estimate
