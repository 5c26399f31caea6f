"""How a run in a directory stands, and how others mark it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_exp import compose
from lora_exp.config.settled import fingerprint, fingerprints
from lora_exp.errors import ConfigError, OccupiedError
from lora_exp.record.run import Record
from lora_exp.record.standing import (
    described,
    doubt,
    doubted,
    farthest,
    mark,
    set_aside,
    standing,
)


def test_a_finished_run_is_never_marked_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    cfg = compose("tracking=none")
    path = tmp_path / "run.json"
    values = {"status": "running", "fingerprint": fingerprint(cfg), "name": "x"}
    path.write_text(json.dumps(values))
    assert standing(tmp_path, cfg) == "running"
    mark(tmp_path, "failed", "killed")
    assert json.loads(path.read_text()) == values | {"status": "failed", "error": "killed"}
    path.write_text(json.dumps(values | {"status": "finished"}))
    mark(tmp_path, "failed", "killed")
    assert standing(tmp_path, cfg) == "finished"
    with pytest.raises(ConfigError, match="holds another run"):
        standing(tmp_path, compose("seed=7"))
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        standing(tmp_path, cfg)


def test_a_doubt_stays_whatever_the_run_writes_afterwards(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("tracking=none"))
    assert not doubted(tmp_path)
    record.update(lockstep={"passes": 9, "proven": False})
    record.update(lockstep={"passes": 20, "proven": True})  # a resumed part that was verified
    assert doubted(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["lockstep"]["passes"] == 20


def test_a_run_can_be_doubted_by_others_and_nothing_else_of_it_changes(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("tracking=none"))
    before = dict(record.values)
    doubt(tmp_path)
    assert doubted(tmp_path)
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept.pop("lockstep") == {"proven": False}
    assert kept == before
    doubt(tmp_path / "nothing there")
    (tmp_path / "run.json").write_text("{")
    assert not doubted(tmp_path)


def test_what_is_set_aside_is_kept_under_a_name_of_its_own(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "run.json").write_text(str(n))
        set_aside(tmp_path / "0")
    names = ["0.not-proven-equal", "0.not-proven-equal2", "0.not-proven-equal3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name / "run.json").read_text() for name in names] == ["0", "1", "2"]


def test_a_run_that_was_trained_longer_is_still_this_run(tmp_path: Path) -> None:
    asked, longer = compose("train.max_steps=3"), compose("train.max_steps=8")
    Record(tmp_path, longer).update(status="finished")
    assert standing(tmp_path, asked) == "finished"
    assert standing(tmp_path, compose("train.max_steps=9")) == "interrupted"
    assert farthest(tmp_path, asked)["max_steps"] == 8
    assert farthest(tmp_path, compose("train.max_steps=9"))["max_steps"] == 9
    for other in (["train.max_steps=3", "seed=7"], ["train.max_steps=-1"]):
        with pytest.raises(OccupiedError, match="holds another run"):
            standing(tmp_path, compose(*other))


def test_zero_and_zero_point_zero_are_one_run(tmp_path: Path) -> None:
    one, other = (compose(f"train.weight_decay={zero}") for zero in ("0", "0.0"))
    assert fingerprint(one) == fingerprint(other)
    assert fingerprints(one)[1] != fingerprints(other)[1]
    Record(tmp_path, one).update(status="finished", fingerprint=fingerprints(other)[1])
    assert standing(tmp_path, other) == "finished"  # by an earlier version's fingerprint


def test_a_killed_run_says_where_it_was_killed_and_how_it_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("train.max_steps=9"))
    record.log({"train/loss": 1.0}, 5)
    assert described(tmp_path) == "running"
    record.lock.release()
    assert described(tmp_path) == f"killed at step 5; resume={tmp_path}"
    record.update(status="finished")
    assert described(tmp_path) == "finished"
