"""A sweep's table: summary.csv and summary.json while jobs end, printed at the end."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import CONF
from lora_exp.config.overrides import quoted, split_override
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.files.paths import is_scratch
from lora_exp.files.redaction import REDACTED, redact, redact_files, redact_text
from lora_exp.files.strict import dumps
from lora_exp.files.whole import write_whole
from lora_exp.record.ranking import judgements, sort_key, sweep_table
from lora_exp.record.standing import ASIDE, status_text

COMMAND, SUMMARY, MULTIRUN = "sweep.json", "summary.json", "multirun.yaml"
COLUMNS = {"job", "objective", "goal", "overrides", "metrics"}  # those that are read back
TRIAL_VARIABLES = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
FLAGS = {"main": "--config-path", "command-line": "--config-dir"}  # by Hydra's name for a source
NEW = 0.01  # of a summary's jobs: it is written again when so many have ended
OUR_LAUNCHER = "hydra_plugins.lockstep_launcher"  # it runs callbacks in this process


class SweepTable(Callback):
    """Hydra callback: one row per job; a failed job's row has its error.

    Hydra does not call on_multirun_end when a job failed, so `main` prints the table.
    """

    current: ClassVar[SweepTable | None] = None

    def __init__(self) -> None:
        self.folder = Path()
        self._rows: dict[str, dict[str, Any]] = {}  # by directory
        self._unwritten = 0  # changes since the summary was written
        self.uses_other_launcher, self.has_begun = False, False
        self.began, self.earlier_multirun = 0.0, b""
        self.trial: dict[str, str] = {}
        self.report: str | None = None  # the name of the file to write, if any
        self.master: DictConfig | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The jobs that have ended, the best first."""
        return sorted(self._rows.values(), key=sort_key)

    @rows.setter
    def rows(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = {r["directory"]: r for r in rows}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Replace the table of an earlier sweep in this process."""
        SweepTable.current = self
        self.folder, self.master = Path(config.hydra.sweep.dir), config.hydra
        self.report = config.get("report")
        launcher = str(config.hydra.launcher.get("_target_"))
        self.uses_other_launcher = not launcher.startswith(OUR_LAUNCHER)
        self.began = time.time()
        # those of a W&B agent's trial: else several runs would have the same id
        self.trial = {n: os.environ.pop(n) for n in TRIAL_VARIABLES if n in os.environ}
        multirun = self.folder / MULTIRUN
        self.earlier_multirun = multirun.read_bytes() if multirun.is_file() else b""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Note that the launch was not refused."""
        self.has_begun = True

    def on_launch_end(self) -> None:
        """Leave no secret in multirun.yaml, and after a refused launch the earlier multirun.yaml.

        Hydra writes the file before it composes the jobs, which redact it when they begin.
        """
        self.read_jobs()
        self._write(at_once=True)
        if self.earlier_multirun and not (self.has_begun or self.rows):
            write_whole(self.folder / MULTIRUN, self.earlier_multirun.decode())
        redact_files(self.folder, MULTIRUN)

    def read_jobs(self) -> None:
        """Read the jobs that a launcher has run in other processes, where no callback runs."""
        folders = sorted(path.parent for path in self.folder.glob("*/.hydra"))
        folders = [folder for folder in folders if not ASIDE.search(folder.name)]
        files = (path for folder in folders for path in (folder / ".hydra").rglob("*"))
        new = (path for path in files if path.stat().st_mtime >= self.began - 1)
        if not self.uses_other_launcher or self.rows or not any(new):
            return
        self.rows = map(read_row, folders)
        write_summary(self.folder, self.rows)

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        """Read a job's result from its directory, and keep the summary up to date."""
        if SweepTable.current is not self:
            return  # a single run
        directory = Path(config.hydra.runtime.output_dir)
        self._rows.pop(str(directory), None)  # if trained again
        overrides = list(config.hydra.overrides.task)
        self._rows[str(directory)] = job_row(directory, overrides, job_return)
        self._unwritten += 1
        self._write()

    def mark_unproven(self, directory: Path) -> None:
        """Mark an ended job as not proven equal to its run alone."""
        if row := self._rows.get(str(directory.absolute())):
            row["proven"] = False
            self._unwritten += 1
            self._write()

    def _write(self, at_once: bool = False) -> None:
        """Write the summary if enough has changed: all writes together are linear in the jobs."""
        if self._unwritten and (at_once or self._unwritten >= NEW * len(self._rows)):
            write_summary(self.folder, self.rows)
            self._unwritten = 0

    def print_table(self) -> None:
        """Print the jobs, the best first, and the errors below them."""
        from rich.text import Text

        from lora_exp.record.console import console

        rows = self.rows
        console.print(sweep_table(self.folder, rows))
        jobs_by_error: dict[str, list[str]] = {}
        for r in rows:
            if r["error"]:
                jobs_by_error.setdefault(r["error"], []).append(r["job"])
        for error, jobs in jobs_by_error.items():
            console.print(Text(f"job{'s' * (len(jobs) > 1)} {', '.join(jobs)}: {error}"))
        if not is_scratch(self.folder):
            console.print(f"{self.folder}/summary.csv and summary.json have the rest")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a sweep's jobs from their directories, the best first."""
    jobs = (path.parent for path in folder.glob("*/run.json"))
    return sorted((read_row(job) for job in jobs if not ASIDE.search(job.name)), key=sort_key)


def best_job(folder: Path) -> Path | None:
    """Return the directory of a sweep's best job; None: no job has finished, or none is best.

    Jobs that are judged by different objectives cannot be compared.
    """
    rows = [r for r in read_rows(folder) if r["objective"] is not None and r["status"] != "pruned"]
    return folder / rows[0]["job"] if len(judgements(rows)) == 1 else None


def write_command(folder: Path, hydra: DictConfig, keep: bool) -> None:
    """Save a sweep's command line: `resume` launches it again.

    Hydra's own multirun.yaml is overwritten by every command that names the directory.

    Args:
        folder: that of the sweep.
        hydra: the `hydra` section of the config.
        keep: keep an earlier command, since jobs of this one were refused.
    """
    path = folder / COMMAND
    if keep and path.is_file():
        return
    config_flags = []
    for source in hydra.runtime.config_sources:
        if source.provider in FLAGS and source.path != str(CONF):
            config_flags += [FLAGS[source.provider], source.path]
    if hydra.job.config_name != "config":  # that of `main`
        config_flags += ["--config-name", hydra.job.config_name]
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    overrides = [
        o for o in overrides if not re.match(r"hydra\.(mode|sweep\.dir)=|retry_failed=", o)
    ]
    write_whole(path, json.dumps(redact(["-m", *config_flags, *overrides]), indent=1) + "\n")


def saved_command(folder: Path) -> list[str]:
    """Return the command line that resumes a sweep.

    Raises:
        ConfigError: the command contained a secret, which was not saved.
    """
    arguments: list[str] = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    if any(REDACTED in word for word in arguments):
        text = f"{folder} was launched with a secret; give its command again, with hydra.sweep.dir"
        raise ConfigError([("resume", text)])
    return [*arguments, f"hydra.sweep.dir={quoted(folder)}"]


def job_row(directory: Path, overrides: list[str], job_return: Any) -> dict[str, Any]:
    """Return the table row of a finished or failed job."""
    path = directory / "run.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    result = job_return._return_value
    error_text, recorded = redact_text(str(result)), str(record.get("error") or "")
    is_recorded = recorded != "" and (error_text in recorded or recorded in error_text)
    if isinstance(result, BaseException) and not is_recorded:
        record = {}  # that of another run in the directory: the job was refused
    error = record.get("error") or (str(result) if isinstance(result, BaseException) else None)
    objective = result if isinstance(result, float) and math.isfinite(result) else None
    pairs = map(split_override, redact(overrides))
    return {
        "job": directory.name,
        "name": record.get("name", directory.name),
        "objective": objective,
        "judged_by": record.get("objective"),
        "algorithm": record.get("choices", {}).get("algorithm"),
        "goal": record.get("goal"),
        "place": record.get("place"),
        "status": record.get("status", "failed"),
        "stopped": record.get("stopped"),
        "error": redact(error),
        "overrides": dict(pairs),
        "proven": record.get("lockstep", {}).get("proven") is not False,
        "fingerprint": record.get("fingerprint"),
        "metrics": record.get("metrics", {}),
        "directory": str(directory),
    }


def read_row(directory: Path) -> dict[str, Any]:
    """Return the table row of a job from its directory alone."""
    path = directory / "run.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    result = JobReturn()
    result._return_value = LoraExpError(record.get("error") or f"see {directory}/run.log")
    if record.get("status") in ("finished", "pruned"):
        result._return_value = record["metrics"][record["objective"]]
    saved = directory / ".hydra" / "overrides.yaml"
    overrides: Any = OmegaConf.load(saved) if saved.is_file() else []
    values = job_row(directory.absolute(), list(map(str, overrides)), result)
    return values | ({"status": status_text(directory)} if record else {})


def refresh_row(directory: Path) -> None:
    """Update the row of a job that was resumed alone in the summary of its sweep."""
    rows = _read_summary(directory.parent / SUMMARY)
    earlier = [r for r in rows if r["job"] == directory.name]
    if earlier and (directory / "run.json").is_file():
        current = read_row(directory) | {"overrides": earlier[0]["overrides"]}
        rows = [current if r in earlier else r for r in rows]
        write_summary(directory.parent, sorted(rows, key=sort_key))


def _read_summary(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a summary; none if there is no such file, or another tool wrote it."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    is_ours = isinstance(rows, list) and all(
        isinstance(r, dict) and r.keys() >= COLUMNS for r in rows
    )
    return rows if is_ours else []


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write summary.json with everything; summary.csv has a column for each override and metric."""
    jobs = ",\n".join(map(dumps, rows))  # a line for each: json indents slowly
    write_whole(folder / SUMMARY, f"[\n{jobs}\n]\n")
    columns = [key for key in rows[0] if key not in ("metrics", "overrides")]
    override_keys = list(dict.fromkeys(key for r in rows for key in r["overrides"]))
    metric_names = sorted({name for r in rows for name in r["metrics"]})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*columns, *override_keys, *metric_names])
    for r in rows:
        row = r | {"stopped": (r.get("stopped") or {}).get("reason")}
        values = [*map(row.get, columns), *map(r["overrides"].get, override_keys)]
        table.writerow([*values, *map(r["metrics"].get, metric_names)])
    write_whole(folder / "summary.csv", text.getvalue())
