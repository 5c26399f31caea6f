"""The report as a file: one page, the same bytes from the same runs, small and quick."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from lora_exp.comparison.page import embedded
from lora_exp.comparison.value import compare
from tests.comparison.conftest import Write
from tests.comparison.sweeps import HOSTILE, write_sweep


def test_equal_runs_give_equal_bytes_without_a_place_or_time(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        sweep = write_sweep(tmp_path / name / "s", ranks=(4,), seeds=(1, 2), points=8)
        pages.append(compare(sweep).to_html("sweep"))
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0]


def test_a_hundred_runs_of_two_hundred_points_are_small_and_quick(tmp_path: Path) -> None:
    rates, seeds = (1e-4, 3e-4, 1e-3, 3e-3), (1, 2, 3, 4, 5)
    sweep = write_sweep(tmp_path / "s", (2, 4, 8, 16, 32), rates, seeds, 200, 100)
    compared = compare(sweep)
    start = time.process_time()
    page = compared.to_html()
    assert len(compared.runs) == 100
    assert time.process_time() - start < 2
    assert len(page.encode()) < 8_000_000


def test_foreign_text_ends_no_script_and_opens_no_tag(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", ranks=(4,), seeds=(1,), points=8, hostile=True)
    page = compare(sweep).to_html(HOSTILE)
    own, _, _ = page.partition("<script>/**")  # where plotly begins
    data = re.findall(r'<script type="application/json" id="[\w-]+">(.*?)</script>', own, re.S)
    assert len(data) == 3
    assert any("window.hurt" in str(json.loads(text)) for text in data)
    assert not re.search(r"<(script|img|iframe|object|svg)\b(?! type=.application/json)", own)
    assert "\u2028" not in "".join(data)
    assert "{{7*7}}" in own  # not 49


def test_embedded_values_are_json_that_ends_no_script() -> None:
    value = {"</script>": ["<!--", "\u2028", "&", "\ud800", float("nan")]}
    text = embedded(value)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == {"</script>": ["<!--", "\u2028", "&", "\ud800", None]}


def test_half_a_surrogate_pair_does_not_break_the_page(write_run: Write) -> None:
    page = compare(write_run("a", error="\ud800")).to_html("\ud800")
    assert "<title>?</title>" in page
    assert "<dd>?</dd>" in page


@pytest.mark.parametrize("status", ["failed", "running"])
def test_runs_without_a_value_have_a_page_too(write_run: Write, status: str) -> None:
    page = compare(write_run("a", None, status=status, error="out of memory")).to_html()
    assert "No run has finished" in page
    assert "out of memory" in page
    assert len(page) < 100_000  # without plotly, for there is nothing to draw


def test_each_objective_has_its_own_table(write_run: Write) -> None:
    write_run("s/1", 0.5, overrides={"peft.r": 4})
    path = write_run("s/2", 0.5, metrics={"eval/acc": 0.9}, objective="eval/acc", goal="maximize")
    page = compare(path.parent).to_html()
    assert '<h2 id="groups-title">Groups: eval/loss</h2>' in page
    assert '<h2 id="groups-2-title">Groups: eval/acc</h2>' in page
