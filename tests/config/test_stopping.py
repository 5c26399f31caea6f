"""Early stopping that cannot work is refused before anything loads."""

from __future__ import annotations

import pytest

from lora_exp import compose
from lora_exp.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["early_stopping=halving", "early_stopping.eta=1"], "early_stopping.eta", "below 2"),
        (["early_stopping=halving", "early_stopping.first_rung=1.5"],
         "early_stopping.first_rung", "share of the training steps"),
        (["early_stopping=halving", "early_stopping.first_rung=0.02"],
         "early_stopping.first_rung", "inside the warm-up (0.05 of them)"),
        (["early_stopping=halving", "train.max_steps=90", "train.warmup_steps=10"],
         "early_stopping.first_rung", "step 10 is inside the warm-up of 10 steps"),
        (["early_stopping=halving", "objective=eval/los"], "objective", "eval/loss"),
        (["early_stopping=halving", "objective=train/loss"], "objective", "not measured there"),
        (["early_stopping=halving", "objective=eval/preference_accuracy"],
         "objective", "not measured there"),
        (["early_stopping=halving", "peft=adalora"], "early_stopping", "adalora cannot resume"),
        (["early_stopping=median", "objective=eval/exact_match", "samples.rows=0"],
         "samples.rows", "eval/exact_match"),
        (["early_stopping=median", "early_stopping.interval=0"],
         "early_stopping.interval", "no share"),
        (["early_stopping=patience", "early_stopping.patience=0"],
         "early_stopping.patience", "below 1"),
        (["early_stopping=patience", "objective=eval/exact_match"],
         "early_stopping", "not in the evaluations"),
        (["early_stopping=patience", "early_stopping.metric=eval/acc"],
         "early_stopping.metric", "not in the evaluations"),
        (["early_stopping=patience", "train.eval_strategy=no"],
         "train.eval_strategy", "patience looks at evaluations"),
        (["early_stopping=threshold"], "early_stopping", "needs a bound"),
        (["early_stopping=threshold", "early_stopping.lower=3", "early_stopping.upper=2"],
         "early_stopping.lower", "not below upper=2"),
    ],
)  # fmt: skip
def test_it_is_refused_by_key(overrides: list[str], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose(*overrides)
    assert [(k, text in fault) for k, fault in refusal.value.faults] == [(key, True)]


def test_a_rung_at_a_known_step_after_the_warm_up_is_accepted() -> None:
    cfg = compose("early_stopping=halving", "train.max_steps=90", "train.warmup_steps=9")
    assert 90 / cfg.early_stopping.eta**2 > cfg.train.warmup_steps


def test_what_is_compared_by_answers_is_accepted() -> None:
    answers = compose("early_stopping=halving", "objective=eval/exact_match_mirror")
    assert answers.goal == "maximize"
    pairs = compose("early_stopping=median", "algorithm=dpo", "data=demo_pairs")
    assert pairs.objective == "eval/preference_accuracy"


def test_rules_that_only_stop_losers_do_not_change_the_fingerprint() -> None:
    from lora_exp.config.settled import fingerprint

    plain = fingerprint(compose())
    assert fingerprint(compose("early_stopping=halving")) == plain
    patient = ["early_stopping=patience", "train.eval_strategy=steps"]
    assert fingerprint(compose(patient[0])) != plain
    often, seldom = (compose(*patient, f"train.eval_steps={steps}") for steps in (2, 5))
    assert fingerprint(often) != fingerprint(seldom)  # evaluations decide where they end
