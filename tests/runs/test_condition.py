"""Conditions of `--where`: what holds, and what is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_exp.errors import ConfigError
from lora_exp.runs.condition import read_condition

VALUES: dict[str, Any] = {
    "peft.r": 16, "status": "finished", "eval/loss": 0.25, "quant": None, "train.bf16": True,
    "date": "2026-11-20T10:00:00+00:00", "name": "r16 (long)", "model.revision": "0123",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("peft.r>=16 and status=finished", True),
        ("peft.r > 16 or status = finished", True),
        ("peft.r<16 and status=finished or peft.r=16", True),  # and binds closer
        ("peft.r<16 and (status=finished or peft.r=16)", False),
        ("peft.r=16.0 and eval/loss<=2.5e-1", True),
        ("peft.r!=16", False),
        ("peft.r==16", True),
        ("quant=null", True),
        ("quant!=nf4", True),
        ("quant<nf4", False),  # without a value there is no order
        ("train.bf16=true", True),
        ("date>=2026-11-20 and date<2026-11-21", True),
        ("name='r16 (long)'", True),
        ('name~"R16 ("', True),
        ("model.revision=0123 and model.revision!=123", True),  # text is compared as text
        ("status=and or status~fin", True),
    ],
)
def test_a_condition_holds(text: str, expected: bool) -> None:
    assert read_condition(text).holds(VALUES.get) is expected


def test_the_keys_of_a_condition_are_known() -> None:
    assert read_condition("a=1 and (b<2 or eval/c~x)").keys == ["a", "b", "eval/c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a key is missing"),
        ("peft.r", "one of = == != ~ < <= > >= after 'peft.r' is missing"),
        ("peft.r>=", "a value after peft.r>= is missing"),
        ("peft.r>=16 status=finished", "'status' is too much"),
        ("peft.r>=16 and", "a key is missing"),
        ("(peft.r>=16", "a ) is missing"),
        ("peft.r (16)", "'(' after 'peft.r' is none of"),
        ("name='open", '"\'open" cannot be read'),
        ("__import__('os').system('x')", "is none of"),
    ],
)
def test_a_mistake_is_one_error_with_an_example(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"--where: .*{re.escape(expected)}.*write it like"):
        read_condition(text)


def test_a_number_is_not_compared_in_order_with_a_text() -> None:
    with pytest.raises(ConfigError, match=r"peft\.r is a number, 'high' is none"):
        read_condition("peft.r>high").holds(VALUES.get)
