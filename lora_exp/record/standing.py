"""How the run in a directory stands, read and marked by others: launchers, plans and tables.

Knows only run.json; what is in it is written by `run`.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.resume import LONGER
from lora_exp.config.settled import fingerprints
from lora_exp.errors import ConfigError, OccupiedError
from lora_exp.files.lock import in_use
from lora_exp.files.strict import dumps
from lora_exp.files.whole import write_whole
from lora_exp.record.contents import CHANGED

FAILED = ("failed", "diverged")
ASIDE = re.compile(rf"\.(not-proven-equal|{CHANGED})\d*$")  # names of directories set aside


def standing(directory: Path, cfg: DictConfig) -> str | None:
    """Return the status of this run if the directory has it, or None if the directory has no run.

    A run that was trained longer than asked is still this run. One that is finished, and now asked
    to be longer, counts as interrupted.

    Raises:
        OccupiedError: the directory holds another run.
        ConfigError: its record cannot be read.
    """
    path = directory / "run.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values["fingerprint"], str(values["status"]), values["name"]
    except (ValueError, KeyError) as error:
        text = f"{path} cannot be read ({error}); move {directory} away to run the job anew"
        raise ConfigError([("hydra.sweep.dir", text)]) from error
    if known[0] in fingerprints(cfg):
        return known[1]
    saved = limits(directory)
    pairs = [(value, cfg.train[key]) for key, value in saved.items() if value != cfg.train[key]]
    if known[0] not in fingerprints(cfg, saved) or any(min(pair) <= 0 for pair in pairs):
        text = f"{directory} holds another run ({known[2]}); take another directory"
        raise OccupiedError([("hydra.sweep.dir", text)])
    longer = any(asked > was for was, asked in pairs)
    return "interrupted" if longer and known[1] == "finished" else known[1]


def limits(directory: Path) -> dict[str, Any]:
    """Return the limits of a run's training, which can be raised when it goes on."""
    path = directory / "config.yaml"
    train = OmegaConf.load(path).train if path.is_file() else {}
    names = (key.rpartition(".")[2] for key in LONGER)
    return {name: train[name] for name in names if name in train}


def farthest(directory: Path, cfg: DictConfig) -> dict[str, Any]:
    """Return the limits with which a job goes on: those asked for, or the run's own if longer."""
    return {name: max(value, cfg.train[name]) for name, value in limits(directory).items()}


def described(directory: Path) -> str:
    """Return a run's status for people: one that says `running` may have been killed."""
    values = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    if values["status"] != "running" or in_use(directory):
        return str(values["status"])
    return f"killed at step {_last_step(directory)}; resume={directory}"


def _last_step(directory: Path) -> int:
    """Return the last step that was logged."""
    path = directory / "metrics.jsonl"
    step = 0
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with suppress(ValueError):  # cut off while it was written
            step = max(step, int(json.loads(line)["step"]))
    return step


def objective(directory: Path) -> float:
    """Return the value of a finished run's objective."""
    values = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    value = values["metrics"][values["objective"]]
    return math.nan if value is None else float(value)


def failure(directory: Path) -> str:
    """Return the error of a failed run."""
    return str(json.loads((directory / "run.json").read_text(encoding="utf-8"))["error"])


def mark(directory: Path, status: str, error: str) -> None:
    """Write the status of a run whose process could not; a finished run stays finished."""
    path = directory / "run.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if values and values["status"] != "finished":
        write_whole(path, dumps(values | {"status": status, "error": error}, indent=1) + "\n")


def doubt(directory: Path) -> None:
    """Write into a run's record that passes of its pack were not the runs alone.

    Raises:
        OSError: it cannot be read or written.
        ValueError: it is no record.
    """
    path = directory / "run.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = values.get("lockstep", {}) | {"proven": False}
        write_whole(path, dumps(values | {"lockstep": kept}, indent=1) + "\n")


def doubted(directory: Path) -> bool:
    """Say whether a directory's run is marked so."""
    try:
        values = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        return not values.get("lockstep", {}).get("proven", True)
    except (OSError, ValueError, AttributeError):
        return False


def set_aside(directory: Path, why: str = "not-proven-equal") -> Path:
    """Move a run's directory away, so that the run can be made anew in its place.

    Args:
        directory: the run's.
        why: becomes part of the directory's new name.

    Raises:
        OSError: it cannot be moved.
    """
    names = (f"{directory.name}.{why}{'' if n == 1 else n}" for n in count(1))
    aside = next(path for name in names if not (path := directory.with_name(name)).exists())
    return directory.rename(aside)
