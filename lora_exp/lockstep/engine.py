"""What carries out a sweep's shares on other machines, as `Cluster` uses it: Slurm, or Ray.

Knows nothing of sweeps: an engine runs one command several times, each with a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class State:
    """What an engine says of a submission."""

    in_queue: bool  # it waits or runs
    text: str  # for people, with the node or the reason


class Engine(Protocol):
    """A cluster whose machines share a disk. A *submission* is one run of a command there."""

    name: str  # the executor's, and of the folder for shares
    unit: str  # what the engine calls a submission
    limit: int  # of submissions at once
    retries: int  # times in a row that a submission may end without having saved anything

    def submit(self, command: Sequence[str], folder: Path, count: int) -> list[str]:
        """Submit a command `count` times; return the ids.

        Args:
            command: words; the n-th submission gets one more, `folder/n`.
            folder: on the shared disk, that gets the logs.
            count: of submissions.

        Raises:
            ConfigError: the engine refuses; nothing was submitted.
        """

    def states(self) -> Mapping[str, State]:
        """Return the states of all submissions that the engine still knows.

        Raises:
            LoraExpError: it does not answer.
        """

    def stop(self, ids: Iterable[str], at_once: bool = False) -> None:
        """End submissions; what trains saves a checkpoint at the end of its step, or `at_once`."""

    def earlier(self, folder: Path) -> list[str]:
        """Return what an earlier launch has submitted for a folder, and has not ended."""

    def close(self) -> None:
        """Leave the cluster."""
