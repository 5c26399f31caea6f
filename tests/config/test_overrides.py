"""Overrides are split alike for names, tables, resuming and starting."""

from __future__ import annotations

import pytest

from lora_exp.config.overrides import split_override


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_an_override_is_a_key_and_a_value(sign: str) -> None:
    assert split_override(f"{sign}peft.r=8") == ("peft.r", "8")
    assert split_override(f"{sign}data.path=a=b.jsonl") == ("data.path", "a=b.jsonl")


def test_a_deletion_has_no_value() -> None:
    assert split_override("~peft.rank_pattern") == ("peft.rank_pattern", "")
