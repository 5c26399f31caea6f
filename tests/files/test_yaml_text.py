"""YAML in OmegaConf's bytes."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lora_exp.config.composition import compose
from lora_exp.config.door import plain
from lora_exp.files.yaml_text import to_yaml


def test_strings_that_look_like_something_else_are_quoted_as_omegaconf_quotes_them() -> None:
    texts = ["yes", "1e-3", "1_000", "null", "~", "a: b", "", " x", "ä ü", "two\nlines", "x" * 200]
    values = {"texts": texts, "empty": {}, "none": None, "numbers": [1, 2.0, 1e-05, True], "no": {}}
    assert to_yaml(values) == OmegaConf.to_yaml(values)


@pytest.mark.parametrize("experiment", ["demo_grpo", "module_sweep"])
def test_a_config_is_written_as_omegaconf_writes_it(experiment: str) -> None:
    values = plain(compose(f"experiment={experiment}", "peft.r=5"))
    assert to_yaml(values) == OmegaConf.to_yaml(values)
