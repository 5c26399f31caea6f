"""Send metrics, samples and the adapter to Weights & Biases."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger("lora_exp")


class Wandb:
    """One W&B run; in mode `auto` online if there is a key, else offline.

    Console lines, argv, code, git state, host and hardware facts are not sent.
    """

    def __init__(
        self,
        project: str,
        entity: str | None,
        mode: Literal["auto", "online", "offline"],
        group: str | None,
        log_adapter: bool,
        *,
        directory: Path,
        run_id: str,
        name: str,
        sweep: str | None,
        job_type: str,
        tags: list[str],
        config: dict[str, Any],
    ) -> None:
        import wandb

        self.wandb, self.name, self.log_adapter = wandb, name, log_adapter
        self.data_dir = directory / "wandb"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "dir": str(directory),
            "id": run_id,
            "resume": "allow",
            "name": name,
            "group": group or sweep,
            "job_type": job_type,
            "tags": [tag[:64] for tag in tags],
            "config": config,
            "reinit": "create_new",
            "settings": self._settings(),
        }
        place = _mode(mode, wandb)
        try:
            self.run = wandb.init(mode=place, **options)
        except wandb.errors.CommError as error:
            log.warning("W&B cannot be reached (%s); this run is logged offline", error)
            place = "offline"
            self.run = wandb.init(mode="offline", **options)
        runs = directory / "wandb" / f"offline-run-*-{run_id}"  # a resumed run has several
        offline = f"offline; to send it: wandb sync {runs}"
        self.place = str(self.run.url) if place == "online" else offline

    def _settings(self) -> Any:
        return self.wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            label_disable=True,  # it would look for labels in the main script
            host="",
            program="",
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self.run.log(metrics, step=step)

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Send the answers before and after training as a table."""
        if samples:
            columns = ["prompt", "expected", "before", "after"]
            table = self.wandb.Table(columns=columns)
            for sample in samples:
                table.add_data(*(sample[column] for column in columns))
            self.run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any], saved: Path | None) -> None:
        """Send the summary and the adapter, and close the run."""
        self.run.summary.update(summary)
        # artifacts are staged in the run's directory, so that it can be synced from elsewhere
        with _environment("WANDB_DATA_DIR", str(self.data_dir)):
            if saved is not None and saved.name == "adapter" and self.log_adapter:
                artifact = self.wandb.Artifact(f"{saved.name}-{self.run.id}", type="model")
                for path in sorted(saved.iterdir()):  # add_dir would print
                    artifact.add_file(str(path))
                self.run.log_artifact(artifact)
            self.run.finish(exit_code=1 if saved is None else 0)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _mode(mode: str, wandb: Any) -> Any:
    """Decide without network and without a prompt: wandb.init would raise, or block for minutes."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
