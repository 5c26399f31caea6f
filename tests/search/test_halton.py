"""Halton's sequence against numbers worked out by hand."""

from __future__ import annotations

import random

from lora_exp.search.halton import halton


def test_a_point_is_the_radical_inverses_plus_a_shift() -> None:
    shift = random.Random(3)
    x, y, z = (shift.random() for _ in range(3))
    points = [(1 / 2, 1 / 3, 1 / 5), (1 / 4, 2 / 3, 2 / 5), (3 / 4, 1 / 9, 3 / 5)]
    for number, (a, b, c) in enumerate(points):
        expected = [(a + x) % 1, (b + y) % 1, (c + z) % 1]
        assert [round(v, 12) for v in halton(number, 3, 3)] == [round(v, 12) for v in expected]


def test_points_fill_each_quarter_equally() -> None:
    quarters = [0] * 4
    for number in range(64):
        a, b = halton(number, 2, 5)
        quarters[2 * (a >= 0.5) + (b >= 0.5)] += 1
    assert all(14 <= n <= 18 for n in quarters)
