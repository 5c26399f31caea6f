"""Settings that learn nothing are refused, and too few rows for a step."""

from __future__ import annotations

import pytest

from lora_exp import compose
from lora_exp.config.learning import check_rows
from lora_exp.errors import ConfigError
from tests.config.test_validation import faults

PAIRS = ["data=demo_pairs"]
REWARDED = ["algorithm.rewards=[lora_exp.rewards.similarity,lora_exp.rewards.exact_match]"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["algorithm=dpo", *PAIRS, "algorithm.args.beta=0.0"], "algorithm.args.beta"),
        (["algorithm=dpo", *PAIRS, "algorithm.args.beta=0", "algorithm.args.loss_type=[ipo,hinge]"],
         "algorithm.args.beta"),
        (["algorithm=kto", *PAIRS, "algorithm.args.beta=0"], "algorithm.args.beta"),
        (["algorithm=kto", *PAIRS, "algorithm.args.desirable_weight=0",
          "algorithm.args.undesirable_weight=0.0"], "algorithm.args.desirable_weight"),
        (["algorithm=dpo", *PAIRS, "+algorithm.args.loss_weights=[0]"],
         "algorithm.args.loss_weights"),
        (["algorithm=ppo", *REWARDED, "+algorithm.args.reward_weights=[0,0.0]"],
         "algorithm.args.reward_weights"),
        (["algorithm=rloo", *REWARDED, "algorithm.args.num_generations=1"],
         "algorithm.args.num_generations"),
    ],
)  # fmt: skip
def test_settings_that_learn_nothing_are_refused(overrides: list[str], key: str) -> None:
    assert list(faults(*overrides)) == [key]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "algorithm=dpo",
            *PAIRS,
            "algorithm.args.beta=0",
            "algorithm.args.loss_type=[sigmoid,sft]",
        ],
        ["algorithm=grpo", *REWARDED, "algorithm.args.beta=0"],
        ["algorithm=ppo", *REWARDED, "+algorithm.args.reward_weights=[0,1]"],
    ],
)
def test_settings_that_still_learn_are_accepted(overrides: list[str]) -> None:
    assert compose(*overrides).train.learning_rate > 0


@pytest.mark.parametrize(
    ("overrides", "minimum"),
    [
        (["algorithm=grpo", *REWARDED, "train.per_device_train_batch_size=32"], 4),
        (["algorithm=rloo", *REWARDED, "train.gradient_accumulation_steps=3"], 6),
        (["algorithm=grpo", *REWARDED, "+algorithm.args.steps_per_generation=4",
          "algorithm.args.num_generations=4"], 16),
        (["algorithm=grpo", *REWARDED, "+algorithm.args.generation_batch_size=48"], 6),
        (["+train.dataloader_drop_last=true", "train.per_device_train_batch_size=5"], 5),
        (["algorithm=ppo", *REWARDED, "algorithm.args.num_minibatches=3"], 48),
        (["train.per_device_train_batch_size=5"], 1),
    ],
)  # fmt: skip
def test_rows_have_to_fill_a_step(overrides: list[str], minimum: int) -> None:
    cfg = compose(*overrides)
    check_rows(cfg, minimum)
    with pytest.raises(
        ConfigError, match=f"a step takes {minimum} .*, and there are {minimum - 1}"
    ):
        check_rows(cfg, minimum - 1)


def test_rows_to_be_packed_are_counted_after_packing() -> None:
    cfg = compose("+train.dataloader_drop_last=true", "algorithm.args.packing=true")
    check_rows(cfg, 3)
    with pytest.raises(ConfigError, match="a step takes"):
        check_rows(cfg, 3, packed=True)
