"""Seconds and tokens of training, whatever else takes time."""

from __future__ import annotations

import time

import pytest

from lora_exp.record.clock import Clock


def test_evaluations_take_no_time() -> None:
    clock = Clock()
    evaluate = clock.without(lambda seconds: time.sleep(seconds))
    clock.begin()
    evaluate(0.2)
    assert clock.seconds < 0.1
    time.sleep(0.05)
    assert 0.05 <= clock.seconds < 0.15


def test_an_evaluation_that_fails_takes_none_either() -> None:
    def fail() -> None:
        time.sleep(0.1)
        raise ValueError("no rows")

    clock = Clock()
    with pytest.raises(ValueError, match="no rows"):
        clock.without(fail)()
    assert clock.seconds < 0.05


def test_a_trainer_that_counts_on_after_a_resume_starts_from_there() -> None:
    clock, counted = Clock(), [1000]
    clock.count = lambda: counted[0]
    clock.begin()
    counted[0] = 1200
    assert clock.tokens == 200
