"""Send metrics, parameters and samples to MLflow: a folder of files, or a server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from lora_exp.tracking.flat import flat
from lora_exp.tracking.tracker import RunInfo

EXPERIMENT, STORE, LENGTH = "lora-exp", "mlruns", 6000  # the longest value of a parameter
ID = "lora_exp.id"  # the tag that finds a resumed run
STATES = {
    "finished": "FINISHED", "pruned": "FINISHED", "paused": "RUNNING", "interrupted": "KILLED",
    "failed": "FAILED", "diverged": "FAILED",
}  # fmt: skip


class MLflow:
    """One MLflow run; by default in ./mlruns."""

    label: ClassVar[str] = "MLflow"

    def __init__(
        self,
        uri: str | None,
        experiment: str | None,
        *,
        run: RunInfo,
    ) -> None:
        # the file store is maintained, no more; without this, it is refused
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
        self.client = MlflowClient(tracking_uri=uri)
        name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        known = self.client.get_experiment_by_name(name)
        number = known.experiment_id if known else self.client.create_experiment(name)
        self.config, self.run = run.config, self._resumed(number, run.id)
        if self.run is None:
            tags = {ID: run.id, "sweep": run.sweep or "", "algorithm": run.algorithm}
            tags |= dict(choice.split("=", 1) for choice in run.choices)
            created = self.client.create_run(number, tags=tags, run_name=run.name)
            self.run = created.info.run_id
        self.place = f"{uri}, experiment {name}, run {self.run}"

    def _resumed(self, experiment: str, run_id: str) -> str | None:
        found = self.client.search_runs([experiment], f"tags.`{ID}` = '{run_id}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def describe(self, facts: dict[str, Any]) -> None:
        """Send the config and the facts as parameters; a resumed run's stay as they were."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run).data.params
        pairs = {
            _allowed(key).replace("/", "_"): str(value)[:LENGTH]
            for key, value in flat(self.config | {"run": facts}).items()
        }
        new = [Param(key, value) for key, value in pairs.items() if key not in known]
        for first in range(0, len(new), 100):  # the most that a server takes
            self.client.log_batch(self.run, params=new[first : first + 100])

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run, metrics=values)

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Send the answers before and after training as samples.jsonl."""
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.client.log_text(self.run, lines, "samples.jsonl")

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Send the numbers of the whole run, and its state."""
        numbers = {k: float(v) for k, v in summary.items() if v is not None}
        self.log(numbers, int(summary.get("steps") or 0))
        if ended == "pruned":
            self.client.set_tag(self.run, "status", ended)
        self.client.set_terminated(self.run, STATES[ended])


def _allowed(key: str) -> str:
    """Return a name with the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in key)
