"""Events of a worker on another machine, as its launcher reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from lora_exp.errors import DivergedError, Interrupted, Paused
from lora_exp.lockstep.events import EventFile, EventReader


def ended(directory: Path, value: Any) -> JobReturn:
    result = JobReturn()
    result._return_value = value
    result.hydra_cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(directory)}}})  # type: ignore[assignment]
    return result


def test_events_are_read_once_and_in_order_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    reader = EventReader(path)
    assert list(reader) == []
    events = EventFile(path)
    events.send("began", 3)
    assert list(reader) == [["began", 3]]
    events.send("unproven", [3, 4], "a layer")
    with path.open("a") as file:
        file.write('["began", ')  # its rest is not yet visible
    assert list(reader) == [["unproven", [3, 4], "a layer"]]
    EventFile(path).send("began", 5)  # another worker goes on, where the first was killed
    assert list(reader) == [["began", 5]]


def test_an_event_that_is_not_taken_is_read_again(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "0.jsonl")
    for number in range(3):
        events.send("began", number)
    reader = EventReader(tmp_path / "0.jsonl")
    for event in reader:
        if event == ["began", 1]:
            break
    assert list(reader) == [["began", 1], ["began", 2]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, ["finished", "", 0.5, "pruned", 2]),
        (DivergedError("at step 3"), ["failed", "at step 3", None, "pruned", 2]),
        (Paused("waits"), ["paused", "waits", None, "pruned", 2]),
        (Interrupted(), ["interrupted", "asked to stop", None, "pruned", 2]),
    ],
)
def test_an_end_is_sent_with_the_status_in_the_record(
    tmp_path: Path, value: Any, expected: list[Any]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "pruned", "rungs": [{}, {}]}))
    EventFile(tmp_path / "0.jsonl").send("ended", 2, ended(tmp_path, value))
    assert list(EventReader(tmp_path / "0.jsonl")) == [["ended", 2, *expected]]
