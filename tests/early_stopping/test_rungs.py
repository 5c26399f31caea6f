"""The steps of the rungs."""

from __future__ import annotations

import pytest

from lora_exp.early_stopping.rules import Halving, Median
from lora_exp.early_stopping.rungs import rung_steps


@pytest.mark.parametrize(
    ("eta", "first_rung", "steps", "expected"),
    [
        (3, None, 90, [10, 30]),
        (3, None, 81, [9, 27]),
        (3, 1 / 27, 54, [2, 6, 18]),
        (2, None, 10, [3, 5]),
        (4, 0.05, 100, [5, 20, 80]),
        (3, None, 3, [1]),
        (2, 0.5, 1, []),
    ],
)
def test_halving_compares_at_powers_of_eta(
    eta: int, first_rung: float | None, steps: int, expected: list[int]
) -> None:
    rule = Halving(eta=eta, first_rung=first_rung, keep=False)
    assert rung_steps(rule.shares(), steps) == expected


def test_the_median_rule_compares_at_equal_distances() -> None:
    rule = Median(n_startup_trials=1, first_rung=0.2, interval=0.3, keep=False)
    assert rung_steps(rule.shares(), 50) == [10, 25, 40]
