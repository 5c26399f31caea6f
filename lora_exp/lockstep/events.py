"""A worker's events in a file, for a launcher on another machine, to which there is no pipe.

A line of JSON each. Jobs hear nothing of other workers' jobs: at a rung they pause and save.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.errors import Interrupted, Paused
from lora_exp.record.standing import how_ended, rung_reports


class EventFile:
    """The worker's side, used like `Link`."""

    def __init__(self, path: Path) -> None:
        """Begin; a worker that was killed may have cut off the last line."""
        self.path = path
        self._append("\n")

    def send(self, kind: str, *values: Any) -> None:
        """Write an event."""
        if kind == "ended":
            values = values[0], *_ending(values[1])
        self._append(json.dumps([kind, *values]) + "\n")

    def join(self, brackets: Iterable[Bracket]) -> None:
        """Tell nobody: the launcher reads what jobs report from their records."""

    def hear(self) -> None:
        """Take nothing."""

    def news(self) -> bool:
        """Return that nothing can come."""
        return False

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # closed: NFS shows it to others then
            file.write(line)


class EventReader:
    """The launcher's side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the events that were not yet taken; one is taken when the next is asked for."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:  # the worker has not begun
            return
        with file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                try:
                    event = json.loads(line)
                except ValueError:  # empty, or cut off by the worker's end
                    event = None
                if event:
                    yield event
                self._position += len(line)


def _ending(result: JobReturn) -> tuple[str, str, float | None, str, int]:
    """Return how a job ended, its error, its value, and its record's status and count of rungs."""
    value, directory = result._return_value, result.hydra_cfg.hydra.runtime.output_dir  # type: ignore[union-attr]
    recorded = how_ended(Path(str(directory)))[0], len(rung_reports(Path(str(directory))))
    if isinstance(value, BaseException):
        kinds = {Paused: "paused", Interrupted: "interrupted", BaseException: "failed"}
        how = next(name for kind, name in kinds.items() if isinstance(value, kind))
        return how, str(value), None, *recorded
    return "finished", "", value, *recorded
