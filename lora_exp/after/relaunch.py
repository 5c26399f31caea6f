"""Launches a sweep again as it was launched, and compares each of its jobs byte for byte.

The jobs train in the same place as then: in packs and workers, stopped early by each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_exp.after.likeness import Likeness, likeness
from lora_exp.after.reproduction import ENDED, kept_folder, new_folder
from lora_exp.after.saved import jobs, read_json
from lora_exp.config.overrides import quoted, split_override
from lora_exp.config.processes import THREADS
from lora_exp.config.resume import LIMITS
from lora_exp.errors import SavedError
from lora_exp.record.conditions import condition_changes, conditions
from lora_exp.record.contents import changed_files
from lora_exp.record.standing import FAILED
from lora_exp.record.sweep import saved_command
from lora_exp.training.interruption import stop

DIRECTORY = "hydra.sweep.dir"
QUIET = {"tracking": "none", "report": "null"}  # keys that say nothing of what is trained


@dataclass(frozen=True)
class SweepRecipe:
    """All that it takes to launch a sweep again."""

    sweep: Path
    command: Sequence[str]  # of the runner, without a directory
    records: Mapping[str, Mapping[str, Any]]  # of its jobs, by the names of their directories
    reasons: Sequence[str]  # why bits may differ here


@dataclass(frozen=True)
class JobLikeness:
    """How a job and its new training are alike."""

    job: str
    status: str
    new_status: str
    has_same_config: bool
    likeness: Likeness | None  # None: one of the two has not ended as it should

    @property
    def same(self) -> bool:
        """Return whether config, end and bytes are the same."""
        alike = self.likeness is None or self.likeness.same
        return alike and self.has_same_config and self.status == self.new_status


def read_sweep_recipe(sweep: Path, overrides: Sequence[str] = ()) -> SweepRecipe:
    """Read how a sweep was launched, and what is different here and now.

    Args:
        sweep: its directory.
        overrides: what only a command line may say, such as `trusted_targets=[...]`.

    Raises:
        SavedError: it has no job, or one that has not ended.
        ConfigError: its command held a secret, which was not saved.
    """
    records = {folder.name: read_json(folder / "run.json") for folder in jobs(sweep)}
    if not records:
        raise SavedError(f"{sweep} has no job with a run.json: there is nothing to compare")
    going = [name for name, r in records.items() if r.get("status") not in (*ENDED, *FAILED)]
    if going:
        text = f"job{'s' * (len(going) > 1)} {', '.join(going)} of {sweep}"
        raise SavedError(f"not ended: {text}; resume={sweep} goes on")
    pairs = [(word, split_override(word)[0]) for word in saved_command(sweep)]
    trained = [(w, key) for w, key in pairs if key.partition(".")[0] not in QUIET]
    command = [word for word, key in trained if key != DIRECTORY]
    reasons = dict.fromkeys(
        reason for name, record in records.items() for reason in _reasons(sweep / name, record)
    )
    command += [f"{key}={value}" for key, value in QUIET.items()]
    return SweepRecipe(sweep, [*command, *overrides], records, [*reasons])


def relaunch(recipe: SweepRecipe, out: Path | None = None) -> tuple[list[JobLikeness], Path | None]:
    """Launch a sweep again, in a process of its own, and compare its jobs.

    Args:
        recipe: the sweep's.
        out: the folder to train in; None: a temporary one, which is left only if something differs.

    Returns:
        How alike each job is, and the folder, if it is left.

    Raises:
        SavedError: the folder is not empty, or no job began.
    """
    # where all machines see it that have trained the sweep
    with new_folder(out, beside=recipe.sweep.absolute()) as folder:
        words = [*recipe.command, f"{DIRECTORY}={quoted(folder.absolute())}"]
        code = _launched([sys.executable, "-m", "lora_exp", *words], _environment(recipe.records))
        if not jobs(folder):
            raise SavedError(f"{recipe.sweep} cannot be launched again: exit code {code}")
        results = [_compared(recipe, name, folder) for name in recipe.records]
        return results, kept_folder(folder, out, all(result.same for result in results))


def _launched(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a launch to its end and return its exit code; a signal ends it before this process.

    Raises:
        Interrupted: a signal has asked to stop.
    """
    with stop.listening():
        process = subprocess.Popen(command, env=environment)
        stop.forward, stop.silent = process.terminate, True  # the launch prints what it does
        try:
            code = process.wait()
        finally:
            stop.forward, stop.silent = None, False
            process.wait()  # its folder may be deleted then
        stop.check()
        return code


def _environment(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the variables for the number of threads that all jobs had, and for no cache.

    What the cache says of a base before training is no evidence.
    """
    variables = os.environ | {"LORA_EXP_CACHE": ""}
    threads = {record.get("threads") for record in records.values()}
    if len(threads) == 1 and (count := threads.pop()):
        variables |= {THREADS: str(count)}
    return variables


def _compared(recipe: SweepRecipe, name: str, folder: Path) -> JobLikeness:
    record, path = recipe.records[name], folder / name / "run.json"
    new: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    both = record["status"] in ENDED and new.get("status") in ENDED
    return JobLikeness(
        name,
        record["status"],
        new.get("status", "missing"),
        record.get("fingerprint") == new.get("fingerprint"),
        likeness(recipe.sweep / name, folder / name) if both else None,
    )


def _reasons(run: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a job that is trained here and now, with its sweep, may have other bits."""
    cfg = OmegaConf.load(run / "config.yaml")
    yield from (f"{name} has changed since" for name in changed_files(run, cfg))  # type: ignore[arg-type]
    # the number of threads is that of the sweep, whatever this process has
    now = conditions(bool(record.get("batch_invariant"))) | {"threads": record.get("threads")}
    yield from condition_changes(record, now)
    if (record.get("lockstep") or {}).get("proven") is False:
        yield "passes of a pack differed from those of runs alone"
    if record.get("date") not in (None, str(date.today())):
        yield f"a chat template has written the date {record['date']}"
    if any(set(LIMITS) & resume["changes"].keys() for resume in record.get("resumed") or ()):
        yield f"job {run.name} was trained in parts: lora-exp reproduce {run} repeats them"
