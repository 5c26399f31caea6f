"""A deleted key gets the default of its function, or is an error if it is required."""

from __future__ import annotations

import pytest

from lora_exp import compose
from tests.config.test_validation import faults


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("train.weight_decay", 0.0),
        ("train.logging_steps", 10),
        ("train.num_train_epochs", 3.0),
        ("algorithm.args.completion_only_loss", None),
        ("peft.lora_alpha", 8),
        ("peft.bias", "none"),
    ],
)
def test_a_deleted_argument_has_its_own_default(key: str, default: object) -> None:
    node = compose(f"~{key}")
    for part in key.split("."):
        node = node[part]
    assert node == default


@pytest.mark.parametrize(
    "key",
    ["goal", "seed", "samples.rows", "model.path", "data.eval_share", "algorithm.shape",
     "tracking.mode", "train.optim"],
)  # fmt: skip
def test_deleting_a_required_key_is_an_error(key: str) -> None:
    assert faults(f"~{key}") == {key: f"is required; give {key}=..., or do not delete it"}


def test_a_deleted_key_is_part_of_the_runs_name() -> None:
    assert "without_weight_decay" in compose("~train.weight_decay").name


def test_a_null_value_is_not_reported_as_missing() -> None:
    assert "is null already" in faults("~train.eval_steps")["train.eval_steps"]
    assert "no such key" in faults("~train.nonsense")["train.nonsense"]
