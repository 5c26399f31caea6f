"""The interface of trackers, and what each is told of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """A run, as a tracker gets it when it is created."""

    directory: Path
    id: str  # stays the same when the run is resumed
    name: str
    sweep: str | None  # the name of its sweep
    algorithm: str
    choices: list[str]  # the options of groups, as `peft=lora`
    config: dict[str, Any]  # resolved, nested, without secrets


class Tracker(Protocol):
    """The interface of a tracker, which gets a run's metrics in addition to its directory.

    It is created with the keys of its option file, and with `run`, a `RunInfo`. What it raises is
    caught: it gets nothing more, and the run goes on.
    """

    label: str  # its name, for people
    place: str  # where to look

    def describe(self, facts: dict[str, Any]) -> None:
        """Take what is known before training: place, precision, versions, hashes."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of a step: `train/...`, `eval/...`, those of step 0 as `before/...`."""

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Take the answers before and after training."""

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Take the final metrics, the saved folder and how the run ended, and close.

        Args:
            summary: metrics and counts.
            saved: None: nothing was saved.
            ended: the status in the run's record: `finished`, `pruned`, `failed`, `diverged`, or
                `paused` and `interrupted`, after which the run can be resumed.
        """
