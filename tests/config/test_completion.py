"""A shell completes groups, options and keys."""

from __future__ import annotations

from lora_exp.config.completion import completions


def test_groups_keys_and_options_are_completed() -> None:
    assert "peft=" in completions("pe", [])
    assert {"peft.r=", "peft.lora_alpha="} <= set(completions("peft.", []))
    assert "train.max_steps=" in completions("train.max", [])
    assert "+train.max_steps=" in completions("+train.max", [])
    assert completions("quant=n", []) == ["quant=nf4", "quant=none"]


def test_completion_works_in_shells_that_split_words_at_an_equals_sign() -> None:
    assert completions("n", ["quant", "="]) == ["nf4", "none"]
    assert "dpo" in completions("=", ["algorithm"])
    assert completions("", ["peft.r", "="]) == []
