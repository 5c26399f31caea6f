"""Configs by dotted names, and tables that foreign text cannot leave."""

from __future__ import annotations

from lora_exp.tracking.flat import as_markdown, flat


def test_numbers_stay_numbers_and_null_is_left_out() -> None:
    config = {"peft": {"r": 8, "bias": None, "dropout": 0.5, "on": True}, "tags": ["a", 1]}
    assert flat(config) == {"peft.r": 8, "peft.dropout": 0.5, "peft.on": True, "tags": "['a', 1]"}


def test_a_samples_text_stays_in_its_cell() -> None:
    text = as_markdown([{"prompt": "a|b\n\n# c <img src=x>", "after": None}])
    assert text.splitlines() == [
        "|prompt|task|expected|before|after|",
        "|---|---|---|---|---|",
        "|a\\|b # c &lt;img src=x>|||||",
    ]
