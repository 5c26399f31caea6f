"""Axes of keys, ranges of objectives."""

from __future__ import annotations

from typing import Any

from lora_exp.comparison.scale import Axis, inside, limits


def axis_of(*values: Any) -> Axis:
    return Axis([{"key": value} for value in values], "key")


def test_numbers_that_span_much_stand_on_a_logarithmic_axis_with_their_values() -> None:
    axis = axis_of(1e-4, 1e-3, 1e-3)
    assert axis.layout == {"type": "log", "tickvals": [1e-4, 1e-3], "ticktext": ["0.0001", "0.001"]}
    assert [axis.height(at) for at in axis.at] == [0, 1, 1]
    assert axis_of(1, 2).layout.get("type") is None
    assert axis_of(0, 100).layout.get("type") is None


def test_other_values_stand_in_their_order_with_their_texts() -> None:
    axis = axis_of(None, "nf4", True, "x" * 40)
    assert axis.layout["ticktext"] == ["nf4", "null", "true", "x" * 17 + "…"]
    assert axis.at == [1, 0, 2, 3]


def test_points_of_one_value_stand_a_little_apart_around_it() -> None:
    for values in ([2, 2, 2, 8], [1, 1, 1, 2]):
        *same, other = axis_of(*values).apart()
        assert len(set(same)) == 3
        assert same[1] == values[0]
        assert max(same) < other


def test_a_far_value_does_not_squeeze_the_others() -> None:
    low, high = limits([1.0, 1.1, 1.2, 1.3, 1.4, 50.0])
    assert (low < 1.0, 1.4 < high < 3) == (True, True)
    assert limits([1.0, 50.0])[1] > 50  # which of two is the far one?
    assert limits([3.0, 3.0])[0] < 3.0 < limits([3.0, 3.0])[1]
    assert inside(50.0, (low, high)) == high
