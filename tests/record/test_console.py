"""Text, tables and numbers on the console."""

from __future__ import annotations

import logging

import pytest

from lora_exp.record.console import curve, facts, print_and_log, size


@pytest.mark.parametrize(
    ("values", "drawn"), [([], ""), ([1.0], "▁"), ([2, 1], "█▁"), ([1.0] * 3, "▁▁▁")]
)
def test_a_curve_draws_its_values(values: list[float], drawn: str) -> None:
    assert curve(values) == drawn


def test_a_long_curve_is_averaged_to_its_width() -> None:
    assert curve([float(i) for i in range(400)], width=8) == "▁▂▃▄▅▆▇█"


def test_sizes_have_readable_units() -> None:
    assert [size(n) for n in (512, 3 * 2**20, 5 * 2**30)] == ["0.5 KiB", "3 MiB", "5.00 GiB"]


def test_printed_text_is_also_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lora_exp")
    print_and_log(facts("title", {"key": "[value]"}))
    assert "title" in caplog.text
    assert "[value]" in caplog.text
