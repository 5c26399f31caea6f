"""Rewards: their values, and the errors when one fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from lora_exp import compose, rewards, run
from lora_exp.errors import DataError, RewardError
from lora_exp.files.paths import asset
from lora_exp.rewards import (
    AdapterReward,
    Reward,
    completion_text,
    exact_match,
    length,
    regex,
    similarity,
)

CHAT = [{"role": "assistant", "content": "a b"}]
TINY = "pkg://lora_exp/assets/tiny"


def test_texts_and_chats_are_rewarded_alike() -> None:
    assert completion_text("a b") == completion_text(CHAT) == "a b"
    assert exact_match(completions=[" a b\n", CHAT, "b"], answer=["a b", "a b", "a b"]) == [1, 1, 0]
    assert similarity(completions=["ab", CHAT], answer=["ab", None]) == [1.0, None]
    assert similarity(completions=["abxx"], answer=["ab"]) == [2 * 2 / 6]


def test_a_pattern_matches_anywhere_within_a_time_limit() -> None:
    assert regex(r"\d+")(completions=["x 42", "none"]) == [1, 0]
    with pytest.raises(RewardError, match="takes more than 1 s"):
        regex("(a|aa)+$")(completions=["a" * 60 + "b"])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>2+2\n=4</think> <answer>4</answer>", 1),
        ("<think></think><answer>4</answer>\n", 1),
        ("<answer>4</answer><think></think>", 0),
        ("<think>x</think><answer>4", 0),
        ("so: <think>x</think><answer>4</answer>", 0),
        ("<think><think>x</think><answer>4</answer>", 0),
    ],
)
def test_a_format_has_its_sections_in_order_and_nothing_else(text: str, reward: int) -> None:
    assert rewards.format(["think", "answer"])(completions=[text]) == [reward]


def test_the_length_reward_falls_from_1_at_the_limit_to_0_at_twice_the_limit() -> None:
    ids = [[1] * n for n in (1, 4, 6, 8, 20)]
    assert length(4)(completions=ids, completion_ids=ids) == [1, 1, 0.5, 0, 0]


def call(function: Callable[..., Any], **columns: Any) -> Any:
    reward = Reward(function, "mine")
    return reward(["p0", "p1"], ["c0", "c1"], trainer_state=None, **columns)


def test_a_function_gets_only_what_it_asks_for() -> None:
    assert call(lambda completions, answer: [float(a) for a in answer], answer=[1, 2]) == [1, 2]
    assert call(lambda completions, **columns: [float(len(columns))] * 2, answer=[1, 2]) == [3, 3]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda completions: [1 / (c != "c1") for c in completions],
         "reward mine fails on row 1 of the batch: prompt 'p1', completion 'c1': ZeroDiv"),
        (lambda completions: [1.0], "reward mine returned 1 rewards for 2 completions"),
        (lambda completions: [1.0, float("nan")], "reward mine returned nan for row 1: prompt 'p"),
        (lambda completions: [1.0, "good"], "reward mine returned 'good' for row 1"),
    ],
)  # fmt: skip
def test_a_failing_reward_is_named_with_its_row(function: Callable[..., Any], text: str) -> None:
    with pytest.raises(RewardError, match=text):
        call(function)


def test_a_missing_column_is_an_error_before_training() -> None:
    reward = Reward(exact_match, "exact_match")
    reward.check([{"prompt": "p", "answer": "a"}])
    with pytest.raises(DataError, match="exact_match needs the column answer; the rows have task"):
        reward.check([{"prompt": "p", "task": "t"}])


def test_a_users_function_is_a_reward_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def short(completions):\n    return [float(len(str(c)) < 99) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["algorithm=grpo", "algorithm.rewards=[own_rewards.short]", "data=demo_pairs"]
    overrides += ["train.max_steps=1", "train.per_device_train_batch_size=8", "data.eval_rows=8"]
    overrides += ["samples.rows=0", "tracking=none", "algorithm.args.max_completion_length=4"]
    cfg = compose(*overrides, "trusted_targets=[own_rewards.short]")
    assert run(cfg, tmp_path / "run").metrics["eval/reward"] == 1


def test_an_adapter_reward_equals_the_trained_classifier(tmp_path: Path, fresh_base: Any) -> None:
    overrides = ["algorithm=reward", "data=demo_pairs", "train.max_steps=8", "tracking=none"]
    saved = run(
        compose(*overrides, "data.rows=64", "train.learning_rate=1e-2"), tmp_path / "r"
    ).saved
    scorer = AutoModelForSequenceClassification.from_pretrained(asset(TINY), num_labels=1)
    scorer = PeftModel.from_pretrained(scorer, str(saved)).eval()
    model = get_peft_model(fresh_base.model, LoraConfig(r=2, target_modules="all-linear"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reward = AdapterReward(str(saved), compose(), model, fresh_base.tokenizer, "reward_adapter")
    prompts = [[{"role": "user", "content": f"Flip: {'a b c'[:n]}"}] for n in (1, 3, 5)]
    completions = [[{"role": "assistant", "content": c}] for c in ("a", "b a", "c b a")]
    scores = reward(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        ids = fresh_base.tokenizer.apply_chat_template(
            prompt + completion, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            assert scorer(**ids).logits.item() == pytest.approx(score, abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 3
    fresh_base.tokenizer.chat_template = "{{ tools }}{{ messages[-1]['content'] }}"
    assert reward(prompts[:1], completions[:1], tools=[[{"name": "f"}]]) != reward(
        prompts[:1], completions[:1]
    )
    # the trained adapter is unchanged
    assert [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ] == trainable
    assert all(
        torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items()
    )
    assert model.active_adapter == "default"
