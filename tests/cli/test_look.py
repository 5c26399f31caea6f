"""The commands that examine trained models: pages for people, JSON for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.after.test_chat import run_cli

Trained = Callable[..., Path]


def test_a_sweep_is_inspected_as_a_table_and_evaluated_with_its_best_run(
    trained: Trained, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    for number, overrides in enumerate((["peft.r=2"], ["peft.r=8"])):
        shutil.copytree(trained(*overrides), sweep / str(number))
        (sweep / str(number) / ".hydra").mkdir()
        (sweep / str(number) / ".hydra/overrides.yaml").write_text(f"- {overrides[0]}\n")
    report = json.loads(run_cli("inspect", str(sweep), "--json").stdout)
    assert report["jobs"][0]["value"] <= report["jobs"][1]["value"]
    assert report["best"] == report["jobs"][0]["path"]
    page = run_cli("inspect", str(sweep))
    assert f"best: {report['best']}" in page.stdout.replace("\n", "")
    assert "peft.r" in page.stdout
    evaluation = run_cli("evaluate", str(sweep), "--json")
    assert evaluation.returncode == 0, evaluation.stderr
    assert f"its best run is {report['best']}" in evaluation.stderr.replace("\n", "")
    result = json.loads(evaluation.stdout)
    record = json.loads((Path(report["best"]) / "run.json").read_text())
    assert result["data"] == record["data"]
    assert result["rows"] == record["counts"]["eval_rows"]
    assert result["results"]["adapter"]["loss"] == pytest.approx(
        record["metrics"]["eval/loss"], abs=0.05
    )
