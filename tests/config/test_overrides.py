"""Overrides are split alike for names, tables, resuming and starting."""

from __future__ import annotations

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lora_exp.config.overrides import quoted, split_override


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_an_override_is_a_key_and_a_value(sign: str) -> None:
    assert split_override(f"{sign}peft.r=8") == ("peft.r", "8")
    assert split_override(f"{sign}data.path=a=b.jsonl") == ("data.path", "a=b.jsonl")


def test_a_deletion_has_no_value() -> None:
    assert split_override("~peft.rank_pattern") == ("peft.rank_pattern", "")


def test_a_quoted_text_is_what_hydra_reads() -> None:
    parser = OverridesParser.create()
    for characters in itertools.product("a\\'\", ", repeat=4):
        text = "".join(characters)
        override = parser.parse_override(f"key={quoted(text)}")
        assert override.value() == text
