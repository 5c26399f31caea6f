"""Seconds and tokens of training, without evaluations."""

from __future__ import annotations

import time

import pytest

from lora_exp.record.clock import Clock


def test_evaluations_are_not_counted_as_training_time() -> None:
    clock = Clock()
    evaluate = clock.without(lambda seconds: time.sleep(seconds))
    clock.begin()
    evaluate(0.2)
    assert clock.seconds < 0.1
    time.sleep(0.05)
    assert 0.05 <= clock.seconds < 0.15


def test_a_failed_evaluation_is_not_counted_either() -> None:
    def fail() -> None:
        time.sleep(0.1)
        raise ValueError("no rows")

    clock = Clock()
    with pytest.raises(ValueError, match="no rows"):
        clock.without(fail)()
    assert clock.seconds < 0.05


def test_a_resumed_trainers_tokens_count_from_its_start() -> None:
    clock, counted = Clock(), [1000]
    clock.count = lambda: counted[0]
    clock.begin()
    counted[0] = 1200
    assert clock.tokens == 200
