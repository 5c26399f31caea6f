"""PPO's trainer: its passes, gradients, memory, saved critic and settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from lora_exp import compose, run
from lora_exp.algorithm.critic import save_value
from lora_exp.algorithm.ppo import PPOConfig, PPOTrainer
from lora_exp.files.paths import asset
from lora_exp.model.loading import Base, bnb_4bit, bnb_8bit
from tests.algorithm.test_algorithms import overrides_for
from tests.algorithm.test_rollout import ROWS, characters, randomize_adapter
from tests.conftest import tiny
from tests.test_experiment import digest

TINY = "pkg://lora_exp/assets/tiny"


@pytest.fixture
def make(fresh_base: Base, tmp_path: Path) -> Callable[..., PPOTrainer]:
    def make(full: bool = False, rewards: Any = (characters,), **options: Any) -> PPOTrainer:
        model = fresh_base.model
        if full:
            model.requires_grad_(True)
        else:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        args = PPOConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True,
            max_completion_length=6, **({"per_device_train_batch_size": 4} | options),
        )  # fmt: skip
        data = Dataset.from_list(ROWS)
        return PPOTrainer(model, args, data, data, fresh_base.tokenizer, list(rewards))

    return make


def test_each_pass_uses_every_row_once(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(per_device_train_batch_size=2, num_minibatches=2, num_iterations=3)
    trainer.model.train()
    parts = [trainer._prepare_inputs(ROWS[:4]) for _ in range(6)]
    logps_sorted = trainer.buffer["logps"].sum(1).sort().values
    for i in range(0, 6, 2):
        logps = torch.cat([part["logps"].sum(1) for part in parts[i : i + 2]])
        assert torch.equal(logps.sort().values, logps_sorted)
    before = trainer.buffer
    trainer._prepare_inputs(ROWS[4:])
    assert trainer.buffer is not before


def test_policy_and_critic_have_gradients_in_their_own_adapters_only(
    make: Callable[..., PPOTrainer],
) -> None:
    gradients = {}
    for coefficient in (0.0, 0.5):
        trainer = make(value_coef=coefficient)
        for name in ("default", "value"):
            randomize_adapter(trainer.model, name)
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, ROWS[:4])
        gradients[coefficient] = {
            name: parameter.grad for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None
        }  # fmt: skip
        trainer.model.unload()
    for name, gradient in gradients[0.5].items():
        of_critic = ".value." in name or "ppo_value" in name
        assert torch.equal(gradient, gradients[0.0][name]) != of_critic, name
        assert gradient.any(), name


@pytest.mark.parametrize("quantization", [None, bnb_4bit("nf4", True, "bfloat16"), bnb_8bit(6.0)])
def test_policy_value_and_reference_share_one_base(quantization: Any, tmp_path: Path) -> None:
    base = tiny(quantization)
    weights = {parameter.data_ptr() for parameter in base.model.parameters()}
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear"))
    randomize_adapter(model)  # otherwise the base is the reference
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    data = Dataset.from_list(ROWS)
    trainer = PPOTrainer(model, args, data, None, base.tokenizer, [characters])
    assert trainer.reference_adapter == "ref"
    added = {
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.data_ptr() not in weights
    }
    assert {name for name in added if "lora_" not in name} == {"ppo_value.score.weight"}


def test_the_saved_critic_can_be_used_alone(
    make: Callable[..., PPOTrainer], fresh_base: Base, tmp_path: Path
) -> None:
    trainer = make()
    randomize_adapter(trainer.model, "value")
    trainer.model.eval()
    batch = trainer._rollout(ROWS[:4], "train")
    with trainer._critic_active(trainer.model), torch.no_grad():
        values = trainer._values(batch)
    base = Base(fresh_base.model, fresh_base.tokenizer, TINY, None)
    save_value(trainer.model, base, tmp_path / "value")
    scorer = AutoModelForSequenceClassification.from_pretrained(asset(TINY), num_labels=1)
    scorer = PeftModel.from_pretrained(scorer, str(tmp_path / "value")).eval()
    for b in range(4):  # the second token's value is the score of the text before it
        ids = batch["ids"][b][batch["attention"][b].bool()]
        count = int(batch["mask"][b].sum())
        if count > 1:
            with torch.no_grad():
                score = scorer(input_ids=ids[None, : len(ids) - count + 1]).logits.item()
            assert values[b, 1].item() == pytest.approx(score, abs=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    saved = []
    for setting in ("false", "true"):
        command = overrides_for("ppo", f"train.gradient_checkpointing={setting}")
        result = run(compose(*command), tmp_path / setting)
        saved.append({"policy": digest(result.saved), "value": digest(result.directory / "value")})
    for part in ("policy", "value"):
        first, second = (s[part]["adapter_model.safetensors"] for s in saved)
        assert first == second


def test_accumulation_makes_about_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    """Token means of halves differ a little, but the two steps point in the same direction."""
    updates = []
    for size, parts in ((8, 1), (4, 2)):
        batch = [f"train.per_device_train_batch_size={size}"]
        batch += ["train.optim=sgd", "train.learning_rate=1", "train.max_grad_norm=1e9"]
        batch += [f"train.gradient_accumulation_steps={parts}", "algorithm.args.num_minibatches=1"]
        result = run(
            compose(*overrides_for("ppo", "train.max_steps=1", "train.warmup_steps=0", *batch)),
            tmp_path / str(size),
        )
        weights = peft.utils.load_peft_weights(str(result.saved), device="cpu")
        updates.append(
            torch.cat([weight.flatten() for name, weight in weights.items() if "lora_B" in name])
        )
    assert torch.cosine_similarity(*updates, dim=0) > 0.9
    assert 0.6 < updates[0].norm() / updates[1].norm() < 1.6  # 0.5 or 2 if divided wrongly


def test_too_few_prompts_for_a_rollout_are_an_error(make: Callable[..., PPOTrainer]) -> None:
    with pytest.raises(ValueError, match="a rollout takes 16 prompts, but there are 8"):
        make(num_minibatches=4)


def test_beta_follows_the_kl_towards_its_target(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(kl_target=1e-3, kl_horizon=40, beta=0.1)
    randomize_adapter(trainer.model)
    trainer.model.train()
    trainer._prepare_inputs(ROWS[:4])
    assert trainer.beta == pytest.approx(0.1 * (1 + 0.2 * 4 / 40))


@pytest.mark.parametrize(
    "setting",
    ["entropy_coef=0.1", "kl_estimator=k3", "whiten_rewards=true", "whiten_advantages=false"],
)
def test_each_setting_changes_the_policy(setting: str, tmp_path: Path) -> None:
    plain, changed = (
        run(compose(*overrides_for("ppo", "train.max_steps=6", *overrides)), tmp_path / name).saved
        for name, overrides in (("plain", []), ("other", [f"+algorithm.args.{setting}"]))
    )
    assert (
        digest(plain)["adapter_model.safetensors"] != digest(changed)["adapter_model.safetensors"]
    )
