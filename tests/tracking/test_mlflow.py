"""MLflow's files, read with its own client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


def test_a_folder_of_mlflow_holds_metrics_parameters_and_samples(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    store = tmp_path / "store"
    words = ["tracking=[mlflow]", f"tracking.mlflow.uri={store}", "train.logging_steps=1"]
    result = quick_run(*words, "peft.r=4", "sweep_name=ranks")
    client = MlflowClient(tracking_uri=str(store))
    experiment = client.get_experiment_by_name("lora-exp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["peft.r"] == "4"
    assert run.data.params["run.place"] == "alone"
    assert run.data.tags["sweep"] == "ranks"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 3]  # and that of the whole run
    assert losses[-1].value == pytest.approx(result.metrics["train/loss"])
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["samples.jsonl"]
