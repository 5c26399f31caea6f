"""`keep` sets which weights are saved, and the trainer's arguments agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError

STEPS = ["train.eval_strategy=steps", "train.eval_steps=4"]


def test_the_best_is_loaded_and_checkpoints_follow_the_evaluations() -> None:
    assert "load_best_model_at_end" not in compose().train
    train = compose("keep=best").train
    assert (train.load_best_model_at_end, train.save_strategy) == (True, "epoch")
    train = compose("keep=best", *STEPS).train
    assert (train.save_strategy, train.save_steps) == ("steps", 4)
    train = compose("keep=best", "train.eval_strategy=steps").train
    assert (train.save_steps, train.logging_steps) == (10, 10)  # where eval_steps is null
    shares = ["train.eval_strategy=steps", "train.eval_steps=0.1"]
    assert compose("keep=best", *shares).train.save_steps == 0.1
    compose("keep=best", *shares, "train.save_strategy=steps", "train.save_steps=0.1")
    assert compose("keep=best", "train.save_strategy=best").train.save_strategy == "best"


def test_load_best_model_at_end_equals_keep_best() -> None:
    cfg = compose("+train.load_best_model_at_end=true")
    assert cfg.keep == "best"
    assert fingerprint(cfg) == fingerprint(compose("keep=best"))
    assert fingerprint(cfg) != fingerprint(compose())
    cfg = compose("+train.load_best_model_at_end=true", *STEPS)
    assert fingerprint(cfg) == fingerprint(compose("keep=best", *STEPS))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["keep=first"], "'first' is none of last, best"),
        (["keep=last", "+train.load_best_model_at_end=true"], "last, but"),
        (["keep=best", "+train.load_best_model_at_end=false"], "best, but"),
        (["keep=best", "train.eval_strategy=no"], "best needs evaluations"),
        (["keep=best", *STEPS, "train.save_strategy=epoch"], "let them equal eval_"),
        (["keep=best", *STEPS, "train.save_strategy=steps", "train.save_steps=6"], "equal eval_"),
        (["keep=best", *STEPS, "train.save_strategy=steps", "train.save_steps=8"], "equal eval_"),
        (["+train.load_best_model_at_end=true", *STEPS, "train.save_steps=500"], "equal eval_"),
        (["+train.load_best_model_at_end=true", "train.eval_strategy=no", "train.save_strategy=no"],
         "best needs evaluations"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        compose(*overrides)
    assert error.value.faults[0][0] == "keep"


def test_a_run_saved_without_keep_gets_it_from_load_best_model_at_end(tmp_path: Path) -> None:
    values = OmegaConf.to_container(compose("+train.load_best_model_at_end=true"))
    assert isinstance(values, dict)
    del values["keep"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(values))
    assert compose(f"resume={tmp_path}").keep == "best"


def test_a_saved_run_that_may_lose_its_best_is_not_resumed(tmp_path: Path) -> None:
    values = OmegaConf.to_container(compose("keep=best", *STEPS))
    assert isinstance(values, dict)
    values["train"]["save_steps"] = 8
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(values))
    with pytest.raises(ConfigError, match=r"keep: best, but the run saves no .*; start a new run"):
        compose(f"resume={tmp_path}")


@pytest.mark.parametrize(
    ("overrides", "goal"),
    [
        ([], "minimize"),
        (["objective=eval/exact_match_mirror"], "maximize"),
        (["objective=eval/mean_token_accuracy"], "maximize"),
        (["objective=eval/mean_token_accuracy", "goal=minimize"], "minimize"),
        (["algorithm=dpo", "data=demo_pairs"], "maximize"),
        (["algorithm=dpo", "data=demo_pairs", "objective=eval/loss"], "minimize"),
        (["algorithm=dpo", "data=demo_pairs", "objective=eval/rewards/rejected"], "maximize"),
        (["algorithm=kto", "data=demo_pairs", "objective=eval/rewards/margins"], "maximize"),
        (["experiment=demo_grpo", "objective=train/loss"], "minimize"),
        (["experiment=demo_grpo", "objective=eval/kl"], "minimize"),
        (["algorithm=reward", "data=demo_pairs", "objective=eval/margin"], "maximize"),
    ],
)
def test_the_goal_follows_the_objective_unless_it_is_given(overrides: list[str], goal: str) -> None:
    assert compose(*overrides).goal == goal
