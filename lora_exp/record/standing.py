"""How the run in a directory stands, read and marked by others: launchers, plans and tables.

Knows only run.json; what is in it is written by `run`.
"""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path

from omegaconf import DictConfig

from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError
from lora_exp.files.strict import dumps
from lora_exp.files.whole import write_whole

FAILED = ("failed", "diverged")


def standing(directory: Path, cfg: DictConfig) -> str | None:
    """Return the status of this run if the directory has it, or None if the directory has no run.

    Raises:
        ConfigError: the directory holds another run.
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
    if known[0] != fingerprint(cfg):
        text = f"{directory} holds another run ({known[2]}); take another directory"
        raise ConfigError([("hydra.sweep.dir", text)])
    return known[1]


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
