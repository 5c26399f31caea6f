"""Which keys decide the values of others."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.door import CONF
from lora_exp.config.references import references, referred


def test_keys_within_interpolations_are_found_at_any_depth() -> None:
    values = {
        "rate": "${product:2e-5,${rate.peft},${model.factor}}",
        "list": [{"a": "${b.c}"}, "x ${d} y"],
        "plain": ["$", "{}", 1, None],
    }
    assert references(values) == {"rate.peft", "model.factor", "b.c", "d"}


@pytest.mark.parametrize(
    "text", ["${now:%Y}", "${hydra:job.num}", "${oc.env:X}", "${.near}", "${a.${b}}"]
)
def test_what_may_depend_on_more_than_keys_is_not_understood(text: str) -> None:
    assert references({"a": text}) is None


def test_keys_above_and_below_a_reference_decide_too() -> None:
    keys = ["train.seed", "rate.peft", "rate", "peft.r", "model.factor.x", "ratex"]
    assert referred(keys, {"rate.peft", "model.factor"}) == ["rate.peft", "rate", "model.factor.x"]


def test_the_shipped_config_is_understood() -> None:
    text = (CONF / "config.yaml").read_text()
    own = OmegaConf.to_container(OmegaConf.create(text.partition("\nhydra:")[0]))
    assert references(own) == {
        "algorithm.objective", "algorithm.goal", "algorithm.learning_rate", "rate.peft",
        "rate.model",
    }  # fmt: skip
    assert compose("train.learning_rate=1").rate == compose().rate
