"""The notebook of examples/ runs, without jupyter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.comparison.sweeps import write_sweep
from tests.conftest import ROOT


def test_the_cells_of_the_notebook_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((ROOT / "examples/compare.ipynb").read_text(encoding="utf-8"))
    sweep = write_sweep(tmp_path / "sweep", ranks=(4, 16), seeds=(1, 2), points=8)
    monkeypatch.setenv("SWEEP", str(sweep))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # they would be of another day
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "peft.r=16, train.learning_rate=0.001" in printed
    assert "baseline" in printed
    assert (sweep / "comparison.html").stat().st_size > 4_000_000
