"""A sweep's table: every job as it ends, in summary.csv and summary.json, and shown at the end."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lora_exp.redaction import redact


class SweepTable(Callback):
    """Hydra's callback: one row a job; a failed job has its error for a result.

    Hydra does not tell a sweep's end when a job failed, so `main` shows the table, not a callback.
    """

    current: ClassVar[SweepTable | None] = None

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.rows: list[dict[str, Any]] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Take the place of an earlier sweep's table."""
        SweepTable.current = self

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        """Take a job's result from its directory and write the summary anew."""
        if SweepTable.current is not self:
            return  # a run alone
        self.folder = Path(config.hydra.sweep.dir)
        directory = Path(config.hydra.runtime.output_dir)
        self.rows.append(row(directory, list(config.hydra.overrides.task), job_return))
        self.rows.sort(key=lambda r: math.inf if r["objective"] is None else r["objective"])
        write_summary(self.folder, self.rows)

    def show(self) -> None:
        """Print the jobs, the smallest objective first."""
        from rich.table import Table
        from rich.text import Text

        from lora_exp.display import console, short

        table = Table(title=f"{self.folder}", title_justify="left")
        for column in ("job", "name", "objective", "exact match", "seconds", "status"):
            table.add_column(column, overflow="fold")
        for r in self.rows:
            numbers = [short(r[k]) if r[k] is not None else "-" for k in NUMBERS]
            status = r["status"] if r["error"] is None else f"{r['status']}: {r['error']}"
            table.add_row(str(r["job"]), Text(r["name"]), *numbers, Text(status))
        console.print(table)
        console.print(f"{self.folder}/summary.csv and summary.json have the rest")


NUMBERS = ("objective", "exact_match", "seconds")


def row(directory: Path, overrides: list[str], job_return: Any) -> dict[str, Any]:
    """Return what a finished or failed job shows."""
    path = directory / "run.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    result = job_return._return_value
    error = record.get("error") or (str(result) if isinstance(result, BaseException) else None)
    metrics = record.get("metrics", {})
    objective = result if isinstance(result, float) and math.isfinite(result) else None
    overrides = redact(overrides)
    return {
        "job": directory.name,
        "name": record.get("name", " ".join(overrides)),
        "objective": objective,
        "exact_match": metrics.get("eval/exact_match"),
        "seconds": metrics.get("seconds"),
        "status": record.get("status", "failed"),
        "error": error,
        "overrides": overrides,
        "fingerprint": record.get("fingerprint"),
        "metrics": metrics,
        "directory": str(directory),
    }


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write summary.json with everything, summary.csv with a column for each number."""
    from lora_exp.record import write_whole

    write_whole(folder / "summary.json", json.dumps(rows, indent=1) + "\n")
    names = sorted({name for r in rows for name in r["metrics"]})
    kept = [key for key in rows[0] if key not in ("metrics", "overrides")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*kept, *names])
    for r in rows:
        table.writerow([*(r[key] for key in kept), *(r["metrics"].get(n) for n in names)])
    write_whole(folder / "summary.csv", text.getvalue())
