"""Send metrics, settings and samples to Trackio: a database on this machine, or a Space."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

from lora_exp.tracking.flat import COLUMNS
from lora_exp.tracking.tracker import RunInfo

PROJECT = "lora-exp"


class Trackio:
    """One Trackio run, in TRACKIO_DIR; hardware is not watched."""

    label: ClassVar[str] = "Trackio"

    def __init__(
        self,
        project: str | None,
        space: str | None,
        *,
        run: RunInfo,
    ) -> None:
        import trackio

        self.trackio = trackio
        project = project or PROJECT
        with redirect_stdout(io.StringIO()):
            self.run = trackio.init(
                project=project,
                name=f"{run.name}-{run.id}",  # a resumed run is found by its name
                group=run.sweep,
                space_id=space,
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.place = f"trackio show --project {project}" if space is None else space

    def describe(self, facts: dict[str, Any]) -> None:
        """Send the facts with the config, which goes out with the first metrics."""
        self.run.config |= {"run": facts}

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self.run.log(metrics, step=step)

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Send the answers before and after training as a table."""
        rows = [[sample.get(column) or "" for column in COLUMNS] for sample in samples]
        table = self.trackio.Table(columns=list(COLUMNS), data=rows)
        self.run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Send the numbers of the whole run as `summary/...`, and close."""
        from trackio import context_vars

        numbers = {f"summary/{k}": float(v) for k, v in summary.items() if v is not None}
        with redirect_stdout(io.StringIO()):
            self.run.log(numbers, step=int(summary.get("steps") or 0))
            self.run.finish()
        context_vars.current_run.set(None)  # else it is finished again when the process ends
