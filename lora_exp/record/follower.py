"""The record of a run in each of its processes; only the first one writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.parallel.world import world
from lora_exp.record.run import Record


def opened(directory: Path, cfg: DictConfig, day: date | None) -> Record:
    """Return the record of a run: the first process's own, in others one that writes nothing.

    Raises:
        ConfigError: the directory holds another run, is not that to resume, or is in use.
    """
    record = Record(directory, cfg, day) if world.is_first else None
    values = world.shared(record.values if record is not None else {})
    return Follower(directory, values) if record is None else record


class Follower(Record):
    """What the first process has recorded so far; changes stay in memory."""

    def __init__(self, directory: Path, values: dict[str, Any]) -> None:
        self.directory, self.ends_as, self.begun = directory, "finished", True
        self.values = values

    def update(self, **values: Any) -> None:
        """Set fields; `metrics` are merged."""
        metrics = self.values["metrics"] | values.pop("metrics", {})
        self.values |= {**values, "metrics": metrics}

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Do nothing: the first process has the same metrics."""

    def rewind(self, step: int) -> None:
        """Do nothing: the first process drops lines of metrics.jsonl."""

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Do nothing: the first process has the samples."""

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Do nothing: the first process has the values."""

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Do nothing: the first process, or who started it, records how the run ended."""
        yield
