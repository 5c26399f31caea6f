"""Rollouts: the answers, their log-probabilities, KL to the reference and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from lora_exp.algorithm.rollout import RolloutConfig, RolloutTrainer
from lora_exp.model.loading import Base

ROWS = [
    {"prompt": [{"role": "user", "content": text}], "answer": text[-1]}
    for text in ("Flip: a b", "Repeat: c d e f", "Who are you?", "Sort: 3 1 2")
] * 2


def characters(completions: list[Any], log_metric: Any, **_: Any) -> list[int]:
    log_metric("longest", max(len(c[-1]["content"]) for c in completions))
    return [len(c[-1]["content"]) for c in completions]


@pytest.fixture
def make(fresh_base: Base, tmp_path: Path) -> Callable[..., RolloutTrainer]:
    def make(rewards: Any = (characters,), **options: Any) -> RolloutTrainer:
        torch.manual_seed(0)
        model = get_peft_model(fresh_base.model, LoraConfig(r=4, target_modules="all-linear"))
        args = RolloutConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], max_completion_length=6,
            **options,
        )  # fmt: skip
        return RolloutTrainer(
            model, args, Dataset.from_list(ROWS), None, fresh_base.tokenizer, list(rewards)
        )

    return make


def randomize_adapter(model: Any, name: str = "default") -> None:
    """Give an untrained adapter random weights."""
    torch.manual_seed(1)
    for path, parameter in model.named_parameters():
        if f"lora_B.{name}" in path:
            parameter.data.normal_(std=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_kl_equal_a_direct_computation(
    make: Callable[..., RolloutTrainer], temperature: float
) -> None:
    trainer = make(temperature=temperature)
    randomize_adapter(trainer.model)
    batch = trainer._rollout(ROWS[:4], "train")
    model, length = trainer.model.eval(), batch["mask"].shape[1]

    def logps_directly() -> torch.Tensor:
        logps = torch.zeros_like(batch["logps"])
        for b in range(4):  # each row alone, without its padding
            ids = batch["ids"][b][batch["attention"][b].bool()]
            logits = model(input_ids=ids[None]).logits[0, :-1] / temperature
            row_logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            count = int(batch["mask"][b].sum())
            logps[b, :count] = row_logps[-count:]
        return logps

    with torch.no_grad():
        mask = batch["mask"]
        torch.testing.assert_close(batch["logps"] * mask, logps_directly(), atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            reference = logps_directly()
        torch.testing.assert_close(batch["ref_logps"] * mask, reference, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            batch["kl"], (batch["logps"] - reference) * mask, atol=2e-5, rtol=1e-4
        )
    assert batch["kl"].abs().sum() > 0.1
    assert length <= 6


def test_a_completion_ends_at_its_first_end_token_or_is_penalised(
    make: Callable[..., RolloutTrainer],
) -> None:
    trainer = make(missing_eos_penalty=100.0)
    batch = trainer._rollout(ROWS[:4], "train")
    end, new = trainer.processing_class.eos_token_id, batch["ids"][:, -batch["mask"].shape[1] :]
    for tokens, mask, score in zip(new, batch["mask"], batch["scores"], strict=True):
        counted = tokens[mask.bool()].tolist()
        assert end not in counted[:-1]
        assert (counted[-1] == end) == (score > -50)
    assert (batch["scores"] < -50).any()
    assert (batch["scores"] > -50).any()


def test_a_score_is_the_weighted_sum_without_rewards_that_are_none(
    make: Callable[..., RolloutTrainer],
) -> None:
    def no_rewards(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make(rewards=(characters, no_rewards), reward_weights=[0.5, 9.0])
    batch = trainer._rollout(ROWS[:4], "train")
    texts = [
        trainer.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["ids"][:, -batch["mask"].shape[1] :], batch["mask"], strict=True)
    ]
    assert batch["scores"].tolist() == [0.5 * len(text) for text in texts]


def test_sampling_ignores_the_models_penalties_without_changing_its_config(
    make: Callable[..., RolloutTrainer],
) -> None:
    trainer = make()
    base = trainer.model.get_base_model()
    base.generation_config.repetition_penalty = 1.3
    with trainer._sampling(trainer.model):
        assert trainer.model.generation_config.repetition_penalty in (None, 1.0)
    trainer._rollout(ROWS[:4], "train")
    assert base.generation_config.repetition_penalty == 1.3
    assert "longest" in trainer._metrics["train"]


def test_weights_need_one_number_for_each_reward(make: Callable[..., RolloutTrainer]) -> None:
    with pytest.raises(ValueError, match="2 reward_weights for 1 rewards"):
        make(reward_weights=[1.0, 2.0])
