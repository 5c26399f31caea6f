"""What a person sees."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lora_exp.display import SHOWN_TOKENS, curve, facts, preview, show, size
from lora_exp.tokens import IGNORED


def test_the_preview_marks_what_counts(base: Any) -> None:
    ids = base.tokenizer("Hi!\nYes.")["input_ids"]
    labels = [IGNORED] * (len(ids) - 2) + ids[-2:]
    text = preview(ids, labels, base.tokenizer).plain
    assert text.startswith("Hi!↵")
    assert text.count("«") == text.count("»") == 1
    assert text.endswith("»")


def test_a_long_row_is_cut_and_says_so(base: Any) -> None:
    ids = base.tokenizer("x " * 300)["input_ids"]
    assert preview(ids, ids, base.tokenizer).plain.endswith(
        f"» … {len(ids) - SHOWN_TOKENS} more tokens"
    )


@pytest.mark.parametrize(
    ("values", "drawn"), [([], ""), ([1.0], "▁"), ([2, 1], "█▁"), ([1.0] * 3, "▁▁▁")]
)
def test_a_curve_draws_its_values(values: list[float], drawn: str) -> None:
    assert curve(values) == drawn


def test_a_long_curve_is_averaged_to_its_width() -> None:
    assert curve([float(i) for i in range(400)], width=8) == "▁▂▃▄▅▆▇█"


def test_sizes_are_written_for_people() -> None:
    assert (size(3 * 2**20), size(5 * 2**30)) == ("3 MiB", "5.00 GiB")


def test_what_is_shown_is_also_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lora_exp")
    show(facts("title", {"key": "[value]"}))
    assert "title" in caplog.text
    assert "[value]" in caplog.text
