"""Log a search's trials as a W&B run of its own, in a process that cannot disturb the search.

`python -m lora_exp.tracking.search` reads one JSON object: what `_init_run` takes, and the points.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_exp.tracking.wandb import GROUP_LENGTH, PROJECT, _init_run, _shortened

log = logging.getLogger("lora_exp")
TARGET, TIMEOUT = "lora_exp.tracking.wandb.Wandb", 120


class Trial(Protocol):
    """The part of a trial that is logged."""

    @property
    def state(self) -> str:
        """`complete`, `pruned`, `failed` or `asked`."""

    @property
    def value(self) -> float | None:
        """Its objective."""


def report_search(
    config: Mapping[str, Any],
    folder: Path,
    trials: Sequence[Trial],
    numbers: Iterable[int],
    maximize: bool,
) -> None:
    """Log trials that have ended, if the config names W&B; a failure is a warning.

    Args:
        config: that of the whole sweep.
        folder: the search's; it holds the W&B run, and a folder for each trial.
        trials: all so far.
        numbers: those to log.
        maximize: whether a larger value is better.
    """
    try:
        tracking = config.get("tracking") or {}
        if tracking.get("_target_") != TARGET:
            return
        group = tracking.get("group") or config.get("sweep_name") or "/".join(folder.parts[-2:])
        absolute = folder.absolute()
        message = {
            "mode": tracking["mode"],
            "project": tracking.get("project") or PROJECT,
            "entity": tracking.get("entity"),
            "id": hashlib.sha256(str(absolute).encode()).hexdigest()[:8],
            "name": f"search {folder.name}",
            "group": _shortened(str(group), GROUP_LENGTH),
            "dir": str(absolute),
            "points": [_point(folder, trials, number, maximize) for number in numbers],
        }
        command = [sys.executable, "-m", "lora_exp.tracking.search"]
        subprocess.run(
            command, input=json.dumps(message), text=True, capture_output=True, check=True,
            timeout=TIMEOUT,
        )  # fmt: skip
    except Exception as error:
        log.warning("W&B gets nothing of these trials: %s", error)


def _point(folder: Path, trials: Sequence[Trial], number: int, maximize: bool) -> dict[str, Any]:
    """Return what is logged of a trial: its own result, and the search up to it."""
    earlier = trials[: number + 1]
    values = [t.value for t in earlier if t.state == "complete" and t.value is not None]
    states = Counter(trial.state for trial in earlier)
    point: dict[str, Any] = {
        "search/trial": number,
        "search/state": trials[number].state,
        "search/value": trials[number].value,
        "search/best": (max if maximize else min)(values) if values else None,
        **{f"search/{state}": states[state] for state in ("complete", "pruned", "failed")},
    }
    path = folder / str(number) / "run.json"
    rungs = json.loads(path.read_text("utf-8")).get("rungs") if path.is_file() else None
    point["search/rung"] = rungs[-1]["rung"] if rungs else None
    return {key: value for key, value in point.items() if value is not None}


def _log(message: dict[str, Any]) -> None:
    points, mode = message.pop("points"), message.pop("mode")
    (Path(message["dir"]) / "wandb").mkdir(exist_ok=True)
    options = message | {"resume": "allow", "job_type": "search", "reinit": "create_new"}
    run, _ = _init_run(mode, options)
    run.define_metric("search/*", step_metric="search/trial")
    for point in points:
        run.log(point, step=point["search/trial"])
    run.finish()


if __name__ == "__main__":
    _log(json.load(sys.stdin))
