"""The status of the run in a directory, read and set by launchers, plans and tables.

Reads only files; `run` writes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import plain
from lora_exp.config.resume import LIMITS, acting_limit
from lora_exp.config.settled import fingerprints
from lora_exp.errors import ConfigError, OccupiedError
from lora_exp.files.lock import in_use
from lora_exp.files.strict import dumps
from lora_exp.files.whole import write_whole
from lora_exp.record.contents import CHANGED

ALMOST_ALL = 0.9  # of the layers' weights: so much of a dense base is quantised at least
FAILED = ("failed", "diverged")
ASIDE = re.compile(rf"\.(not-proven-equal|{CHANGED})\d*$")  # names of directories set aside


def run_status(directory: Path, cfg: DictConfig) -> str | None:
    """Return the status of a config's run in a directory; None: the directory has no run.

    A run that was trained longer than requested is still the same run. A finished run whose limit
    is raised counts as interrupted.

    Raises:
        OccupiedError: the directory holds another run.
        ConfigError: the record cannot be read.
    """
    path = directory / "run.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recorded = values["fingerprint"], str(values["status"]), values["name"]
    except (ValueError, KeyError) as error:
        text = f"{path} cannot be read ({error}); move {directory} away to run the job anew"
        raise ConfigError([("hydra.sweep.dir", text)]) from error
    if cfg.quant is not None and _left_experts_in_floats(directory, values):
        if cfg.quant.get("experts"):
            text = f"{directory} has experts in floats, as earlier versions left them"
            cure = "give quant.experts=false, or another directory"
            raise OccupiedError([("hydra.sweep.dir", f"{text}; {cure}")])
        cfg = OmegaConf.create(plain(cfg))
        cfg.quant.pop("experts", None)
    if recorded[0] in fingerprints(cfg):
        return recorded[1]
    limits, acting = training_limits(directory), acting_limit(cfg.train)
    pairs = [(value, cfg.train[key]) for key, value in limits.items() if value != cfg.train[key]]
    if recorded[0] not in fingerprints(cfg, limits) or any(min(pair) <= 0 for pair in pairs):
        text = f"{directory} holds another run ({recorded[2]}); take another directory"
        raise OccupiedError([("hydra.sweep.dir", text)])
    longer = cfg.train[acting] > limits.get(acting, cfg.train[acting])
    return "interrupted" if longer and recorded[1] == "finished" else recorded[1]


def _left_experts_in_floats(directory: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a run of an earlier version left the experts of a mixture in floats.

    Its config has no `quant.experts`, and little of its base was quantised.
    """
    path, share = directory / "config.yaml", record.get("quantised_share")
    settings: Any = OmegaConf.load(path) if path.is_file() else {}
    quant = settings.get("quant") or {"experts": None}
    return "experts" not in quant and share is not None and share < ALMOST_ALL


def training_limits(directory: Path) -> dict[str, Any]:
    """Return the limits of a run's training, which can be raised on resume."""
    path = directory / "config.yaml"
    train = OmegaConf.load(path).train if path.is_file() else {}
    names = (key.rpartition(".")[2] for key in LIMITS)
    return {name: train[name] for name in names if name in train}


def farthest_limits(directory: Path, cfg: DictConfig) -> dict[str, Any]:
    """Return the limits with which a job resumes: the requested ones, or the run's if higher."""
    return {name: max(value, cfg.train[name]) for name, value in training_limits(directory).items()}


def status_text(directory: Path) -> str:
    """Return a run's status for people: `running`, or `killed` if no process has it."""
    status = str(_record(directory)["status"])
    if status != "running" or in_use(directory):
        return status
    return f"killed at step {_last_step(directory)}; resume={directory}"


def _record(directory: Path) -> Any:
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))


def _last_step(directory: Path) -> int:
    """Return the last step that was logged."""
    path = directory / "metrics.jsonl"
    step = 0
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with suppress(ValueError):  # cut off while it was written
            step = max(step, int(json.loads(line)["step"]))
    return step


def objective_value(directory: Path) -> float:
    """Return the value of a finished run's objective."""
    record = _record(directory)
    value = record["metrics"][record["objective"]]
    return math.nan if value is None else float(value)


def how_ended(directory: Path) -> tuple[str, str]:
    """Return a run's recorded status, and why it ended early, if it did; empty: no record."""
    try:
        record = _record(directory)
        return str(record["status"]), str((record.get("stopped") or {}).get("reason", ""))
    except (OSError, ValueError, KeyError):
        return "", ""


def rung_reports(directory: Path) -> list[dict[str, Any]]:
    """Return what a run has reported at rungs, as in run.json; none if it cannot be read."""
    try:
        return list(_record(directory).get("rungs") or ())
    except (OSError, ValueError, AttributeError):
        return []


def error_text(directory: Path) -> str:
    """Return the error of a failed run."""
    return str(_record(directory)["error"])


def write_status(directory: Path, status: str, error: str) -> None:
    """Write the status of a run whose process did not; one that has ended stays as it is."""
    path = directory / "run.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if values and values["status"] not in ("finished", "pruned"):
        write_whole(path, dumps(values | {"status": status, "error": error}, indent=1) + "\n")


def mark_unproven(directory: Path) -> None:
    """Write into a run's record that passes of its pack differed from runs alone.

    Raises:
        OSError: the record cannot be read or written.
        ValueError: it is not JSON.
    """
    path = directory / "run.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        lockstep = values.get("lockstep", {}) | {"proven": False}
        write_whole(path, dumps(values | {"lockstep": lockstep}, indent=1) + "\n")


def is_unproven(directory: Path) -> bool:
    """Return whether a directory's run is marked as not proven equal to a run alone."""
    try:
        return _record(directory).get("lockstep", {}).get("proven") is False
    except (OSError, ValueError, AttributeError):
        return False


def set_aside(directory: Path, why: str = "not-proven-equal") -> Path:
    """Rename a run's directory, so that the run can be trained anew in its place.

    Args:
        directory: the run's.
        why: a part of the directory's new name.

    Raises:
        OSError: it cannot be moved.
    """
    names = (f"{directory.name}.{why}{'' if n == 1 else n}" for n in count(1))
    aside = next(path for name in names if not (path := directory.with_name(name)).exists())
    return directory.rename(aside)
