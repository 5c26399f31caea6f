"""A search's file: what it was asked, each batch and each result, appended and never changed.

It holds no times and nothing of the machine: the same search writes the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_exp.errors import ConfigError
from lora_exp.search.trial import Trial

JOURNAL = "search.jsonl"


class Journal:
    """The trials of a search so far, on disk and in memory."""

    def __init__(self, path: Path) -> None:
        """Read the journal, if there is one; a line that a kill has cut off is dropped.

        Raises:
            ConfigError: a line cannot be read.
        """
        self.path = path
        self.asked: dict[str, Any] = {}  # what the search was asked
        self.evidence: list[Trial] = []
        self.trials: list[Trial] = []
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                self._read(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                text = f"{path}, line {number} cannot be read ({error}); start a new search"
                raise ConfigError([("hydra.sweep.dir", text)]) from error

    def _read(self, entry: Mapping[str, Any]) -> None:
        if "search" in entry:
            self.asked = dict(entry["search"])
            self.evidence = [
                Trial(e["values"], e["state"], e["value"], e["step"], e.get("others", {}))
                for e in entry["evidence"]
            ]
        elif "batch" in entry:
            self.trials += [Trial(dict(values)) for values in entry["batch"]]
        else:
            number, value, step = entry["trial"], entry.get("value"), entry.get("step", 0)
            ended = self.trials[number].ended(entry["state"], value, step, entry.get("others"))
            self.trials[number] = ended

    @property
    def waiting(self) -> list[int]:
        """The numbers of trials that have been proposed and have no result."""
        return [number for number, trial in enumerate(self.trials) if trial.state == "asked"]

    def begin(self, asked: dict[str, Any], evidence: Sequence[Trial]) -> None:
        """Write what the search is asked, and what it learns from.

        Raises:
            ConfigError: the journal belongs to a search that was asked something else.
        """
        asked = dict(json.loads(json.dumps(asked)))
        if not self.asked:
            entries = [
                {"values": dict(t.values), "state": t.state, "value": t.value, "step": t.step}
                | _others(t)
                for t in evidence
            ]
            self._append({"search": asked, "evidence": entries})
        elif self.asked != asked:
            keys = [k for k in asked | self.asked if asked.get(k) != self.asked.get(k)]
            differences = (f"{k}: {asked.get(k)}, was {self.asked.get(k)}" for k in keys)
            text = f"{self.path.parent} holds another search ({'; '.join(differences)})"
            raise ConfigError([("hydra.sweep.dir", f"{text}; take another directory")])

    def propose(self, batch: Sequence[Trial]) -> None:
        """Write the trials of a batch, before they train."""
        self._append({"batch": [dict(trial.values) for trial in batch]})

    def end(self, number: int, trial: Trial) -> None:
        """Write a trial's result."""
        entry: dict[str, Any] = {"trial": number, "state": trial.state}
        if trial.value is not None:
            entry["value"] = trial.value
        if trial.state == "pruned":
            entry["step"] = trial.step
        self._append(entry | _others(trial))

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._read(json.loads(json.dumps(entry)))


def _others(trial: Trial) -> dict[str, Any]:
    return {"others": dict(trial.others)} if trial.others else {}
