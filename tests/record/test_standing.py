"""How a run in a directory stands, and how others mark it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_exp import compose
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError
from lora_exp.record.run import Record
from lora_exp.record.standing import doubt, doubted, mark, set_aside, standing


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
