"""Overrides are parted alike for names, tables, resuming and starting."""

from __future__ import annotations

import pytest

from lora_exp.config.overrides import parted


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_an_override_is_a_key_and_a_value(sign: str) -> None:
    assert parted(f"{sign}peft.r=8") == ("peft.r", "8")
    assert parted(f"{sign}data.path=a=b.jsonl") == ("data.path", "a=b.jsonl")


def test_a_deletion_has_no_value() -> None:
    assert parted("~peft.rank_pattern") == ("peft.rank_pattern", "")
