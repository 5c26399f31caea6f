"""Overrides are parted alike for names, tables, resuming and starting."""

from __future__ import annotations

import pytest

from lora_exp.config.overrides import parted


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("peft.r=8", "peft.r", "8"),
        ("+peft.init_lora_weights=pissa", "peft.init_lora_weights", "pissa"),
        ("++train.bf16=true", "train.bf16", "true"),
        ("~peft.rank_pattern", "peft.rank_pattern", ""),
        ("data.path=a=b.jsonl", "data.path", "a=b.jsonl"),
    ],
)
def test_an_override_is_a_key_and_a_value(override: str, key: str, value: str) -> None:
    assert parted(override) == (key, value)
