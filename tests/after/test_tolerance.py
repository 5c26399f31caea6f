"""What a merge may differ by: limits that rounding sets, and that a wrong merge exceeds."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from lora_exp.after.pages import proof as page
from lora_exp.after.tolerance import Proof


@pytest.mark.parametrize(
    ("dtype", "agreement", "experts", "holds"),
    [
        ("float32", 0.9, None, False), ("float32", 1.0, None, True), ("bfloat16", 0.96, None, True),
        ("float32", 1.0, 0.99, False), ("bfloat16", 1.0, 0.0, False), ("bfloat16", 1.0, 0.95, True),
    ],
)  # fmt: skip
def test_a_merge_that_generates_other_tokens_or_takes_other_experts_is_not_proven(
    dtype: str, agreement: float, experts: float | None, holds: bool
) -> None:
    proof = proof_of(dtype=dtype, top1_agreement=agreement, same_experts=experts)
    assert proof.holds == holds


@pytest.mark.parametrize(
    ("dtype", "rounding", "tolerance"),
    [
        ("float32", 0.0, 1e-4),
        ("float32", 1e-4, 4e-4),
        ("float32", 1.0, 0.05),  # of an effect of 10: a change of the update by 1% makes 0.1
        ("bfloat16", 0.0, 0.1),
        ("bfloat16", 0.1, 0.4),
        ("bfloat16", 1.0, 2.0),  # an unmerged base makes 10
    ],
)
def test_measured_rounding_is_allowed_but_little_beside_the_effect_of_an_adapter(
    dtype: str, rounding: float, tolerance: float
) -> None:
    assert proof_of(dtype=dtype, rounding=rounding).tolerance == pytest.approx(tolerance)


def test_a_merge_that_rounding_alone_explains_says_which_dtype_rounds_less() -> None:
    off = proof_of(dtype="bfloat16", rounding=1.0, max_difference=3.0)
    assert off.rounded_off
    assert "NOT the same model: bfloat16 rounds too much; --dtype float32 does not" in page_of(off)
    assert not proof_of(dtype="bfloat16", rounding=0.1, max_difference=3.0).rounded_off
    assert not proof_of(dtype="float32", rounding=1.0, max_difference=3.0).rounded_off
    router = {"dtype": "bfloat16", "max_difference": 0.2, "rounding": 0.1, "same_experts": 0.5}
    assert not proof_of(**router).holds
    assert not proof_of(**router).rounded_off


def proof_of(**values: Any) -> Proof:
    """A proof of nothing but these values."""
    known = {
        "prompts": 1, "tokens": 10, "max_difference": 0.0, "mean_difference": 0.0, "kl": 0.0,
        "top1_agreement": 1.0, "same_text": 1.0, "same_experts": None, "largest_logit": 5.0,
        "effect": 10.0, "rounding": 0.0, "computed_in": "float64", "reference": "it",
    }  # fmt: skip
    return Proof(**known | values)


def page_of(proof: Proof) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(page(proof.values()))
    return capture.get()
