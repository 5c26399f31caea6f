"""Reports of sweeps: written beside the summary, never the reason that a sweep fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.comparison.report import report_sweep, write_report
from lora_exp.comparison.value import compare
from tests.comparison.conftest import Write
from tests.comparison.sweeps import write_sweep


def test_a_sweep_gets_a_report_named_after_its_folder(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "day" / "time", ranks=(4,), seeds=(1,), points=8)
    assert report_sweep(sweep, "report.html") == sweep / "report.html"
    assert "<title>day/time</title>" in (sweep / "report.html").read_text(encoding="utf-8")
    assert report_sweep(sweep, None) is None


def test_a_report_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert report_sweep(tmp_path, "report.html") is None
    assert caplog.messages[0].startswith(f"no report of {tmp_path}: SavedError: ")
    assert len(caplog.messages) == 1
    sweep = write_sweep(tmp_path / "s", ranks=(4,), seeds=(1,), points=8)
    (sweep / "report.html").mkdir()
    assert report_sweep(sweep, "report.html") is None
    assert len(caplog.messages) == 2


def test_a_report_of_many_folders_names_two(write_run: Write, tmp_path: Path) -> None:
    runs = [write_run(f"day/{i}", 0.5) for i in range(4)]
    write_report(compare(*runs), tmp_path / "report.html")
    assert "<title>day/0, day/1 and 2 more</title>" in (tmp_path / "report.html").read_text("utf-8")
