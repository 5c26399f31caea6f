"""Limits of parameters and memory: numbers with units, and cells that break them."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.errors import ConfigError
from lora_exp.search.limits import Limits, Size, read_limits


@pytest.mark.parametrize(
    ("parameters", "memory", "expected"),
    [
        (None, None, {}),
        (200000, 5, {"max_parameters": 200000, "max_bytes": 5}),
        (2e5, "8GiB", {"max_parameters": 200000, "max_bytes": 8 * 2**30}),
        ("3000", "1.5 gb", {"max_parameters": 3000, "max_bytes": 1_500_000_000}),
        (None, "512MiB", {"max_bytes": 2**29}),
    ],
)
def test_limits_are_numbers_and_of_bytes_with_units(
    parameters: Any, memory: Any, expected: dict[str, int]
) -> None:
    limits = read_limits({"max_parameters": parameters, "max_bytes": memory})
    assert limits.asked == expected


@pytest.mark.parametrize("value", ["8GiBs", "GiB", "1.2.3", 0, -1, "", True, [3], "1e999"])
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        read_limits({"max_parameters": value, "max_bytes": value})
    assert "max_parameters: " in str(refused.value)
    assert "is no limit; give bytes, like 8GiB" in str(refused.value)


def test_parameters_have_no_unit() -> None:
    with pytest.raises(ConfigError, match="'2GiB' is no limit; give a number of trainable"):
        read_limits({"max_parameters": "2GiB", "max_bytes": None})


def test_a_cell_may_reach_each_limit_but_not_exceed_it() -> None:
    limits = Limits(100, 1000)
    assert limits.admit(Size(100, 1000))
    assert not limits.admit(Size(101, 1))
    assert not limits.admit(Size(1, 1001))
    assert limits.admit(None)  # its job is refused, with the reason
    assert str(limits) == "max_parameters=100, max_bytes=1000"
    assert Limits().admit(Size(10**12, 10**12))
