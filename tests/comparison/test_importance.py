"""Importance of keys: known numbers, checked against scipy."""

from __future__ import annotations

import random

import pytest
from scipy.stats import f_oneway, spearmanr

from lora_exp.comparison.importance import explained, importance, importances
from lora_exp.comparison.points import points
from tests.comparison.series import run, series


def test_the_share_is_epsilon_squared_of_scipys_analysis_of_variance() -> None:
    parts = [[1.0, 1.2, 0.9], [2.0, 2.4, 2.1], [1.5, 1.4, 1.8]]
    values = [level for level, part in enumerate(parts) for _ in part]
    statistic = f_oneway(*parts).statistic
    between, within = 2, 6  # degrees of freedom
    expected = (statistic - 1) * between / (statistic * between + within)
    assert explained(values, [value for part in parts for value in part]) == pytest.approx(expected)


def test_of_a_number_with_many_levels_it_is_scipys_rank_correlation_squared() -> None:
    numbers = random.Random(0)
    rates = [numbers.random() for _ in range(20)]
    losses = [rate**3 + 0.1 * round(numbers.random(), 1) for rate in rates]
    assert explained(rates, losses) == pytest.approx(spearmanr(rates, losses).statistic ** 2)


def test_what_does_nothing_or_is_different_in_every_run_explains_nothing() -> None:
    assert explained([1, 2, 1, 2], [1.0, 1.0, 3.0, 3.0]) == 0
    assert explained(["a", "b", "c"], [1.0, 2.0, 3.0]) == 0
    assert explained([1, 1], [1.0, 2.0]) == 0
    assert explained([1, 2], [1.0, 1.0]) == 0


def test_the_most_important_key_is_first_and_few_runs_are_warned_of() -> None:
    groups = [
        series(run(rate + rank / 10), run(rate + rank / 9), peft__r=rank, rate=rate)
        for rank in (1, 2)
        for rate in (1, 5)
    ]
    found = points(groups)
    assert list(importances(found)) == ["rate", "peft.r"]
    figure = importance(found)
    assert figure is not None
    assert figure["data"][0]["y"] == ["rate", "peft.r"]
    assert "With 8 runs this is a hint at most" in figure["layout"]["meta"]["caption"]
    many = importance(points(groups * 2))
    assert many is not None
    assert "hint" not in many["layout"]["meta"]["caption"]


def test_one_key_alone_has_no_importance() -> None:
    assert importance(points([series(run(), run(), run(2.0), peft__r=1)])) is None
