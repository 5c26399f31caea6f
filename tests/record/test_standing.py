"""The status of a run in a directory, and marks set by other processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.settled import fingerprint, fingerprints
from lora_exp.errors import ConfigError, OccupiedError
from lora_exp.record.run import Record
from lora_exp.record.standing import (
    farthest_limits,
    is_unproven,
    mark_unproven,
    run_status,
    set_aside,
    status_text,
    write_status,
)


def test_a_finished_run_is_never_marked_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    cfg = compose("tracking=none")
    path = tmp_path / "run.json"
    values = {"status": "running", "fingerprint": fingerprint(cfg), "name": "x"}
    path.write_text(json.dumps(values))
    assert run_status(tmp_path, cfg) == "running"
    write_status(tmp_path, "failed", "killed")
    assert json.loads(path.read_text()) == values | {"status": "failed", "error": "killed"}
    path.write_text(json.dumps(values | {"status": "finished"}))
    write_status(tmp_path, "failed", "killed")
    assert run_status(tmp_path, cfg) == "finished"
    with pytest.raises(ConfigError, match="holds another run"):
        run_status(tmp_path, compose("seed=7"))
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_status(tmp_path, cfg)


@pytest.mark.parametrize(("share", "is_mixture"), [(0.33, True), (1.0, False)])
def test_experts_that_an_earlier_version_left_in_floats_are_told(
    share: float, is_mixture: bool, tmp_path: Path
) -> None:
    asked = ("tracking=none", "quant=nf4", "quant.experts=false")
    cfg, in_floats = compose(*asked[:2]), compose(*asked)
    record = Record(tmp_path, in_floats)
    record.update(quantised_share=share, status="finished", fingerprint=fingerprint(cfg))
    settings = OmegaConf.load(tmp_path / "config.yaml")
    del settings.quant.experts
    OmegaConf.save(settings, tmp_path / "config.yaml")
    if is_mixture:
        with pytest.raises(OccupiedError, match=r"experts in floats, .*give quant\.experts=false"):
            run_status(tmp_path, cfg)
        assert run_status(tmp_path, in_floats) == "finished"
    else:
        assert run_status(tmp_path, cfg) == "finished"
        with pytest.raises(OccupiedError, match="holds another run"):
            run_status(tmp_path, in_floats)


def test_a_run_marked_unproven_stays_unproven(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("tracking=none"))
    assert not is_unproven(tmp_path)
    record.update(lockstep={"passes": 9, "proven": False})
    record.update(lockstep={"passes": 20, "proven": True})  # a resumed part that was verified
    assert is_unproven(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["lockstep"]["passes"] == 20


def test_marking_a_run_unproven_changes_nothing_else(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("tracking=none"))
    before = dict(record.values)
    mark_unproven(tmp_path)
    assert is_unproven(tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    assert values.pop("lockstep") == {"proven": False}
    assert values == before
    mark_unproven(tmp_path / "nothing there")
    (tmp_path / "run.json").write_text("{")
    assert not is_unproven(tmp_path)


def test_a_directory_that_is_set_aside_gets_a_new_name(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "run.json").write_text(str(n))
        set_aside(tmp_path / "0")
    names = ["0.not-proven-equal", "0.not-proven-equal2", "0.not-proven-equal3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name / "run.json").read_text() for name in names] == ["0", "1", "2"]


def test_a_run_that_was_trained_longer_is_the_same_run(tmp_path: Path) -> None:
    shorter, longer = compose("train.max_steps=3"), compose("train.max_steps=8")
    Record(tmp_path, longer).update(status="finished")
    assert run_status(tmp_path, shorter) == "finished"
    assert run_status(tmp_path, compose("train.max_steps=9")) == "interrupted"
    assert farthest_limits(tmp_path, shorter)["max_steps"] == 8
    assert farthest_limits(tmp_path, compose("train.max_steps=9"))["max_steps"] == 9
    for overrides in (["train.max_steps=3", "seed=7"], ["train.max_steps=-1"]):
        with pytest.raises(OccupiedError, match="holds another run"):
            run_status(tmp_path, compose(*overrides))


def test_a_run_is_longer_only_by_the_limit_that_acts(tmp_path: Path) -> None:
    Record(tmp_path / "steps", compose("train.max_steps=5")).update(status="finished")
    longer = ["train.num_train_epochs=10"]
    assert run_status(tmp_path / "steps", compose("train.max_steps=5", *longer)) == "finished"
    assert run_status(tmp_path / "steps", compose("train.max_steps=6", *longer)) == "interrupted"
    Record(tmp_path / "epochs", compose()).update(status="finished")
    assert run_status(tmp_path / "epochs", compose(*longer)) == "interrupted"


def test_0_and_0_0_have_the_same_fingerprint(tmp_path: Path) -> None:
    integer, decimal = (compose(f"train.weight_decay={zero}") for zero in ("0", "0.0"))
    assert fingerprint(integer) == fingerprint(decimal)
    assert fingerprints(integer)[1] != fingerprints(decimal)[1]
    Record(tmp_path, integer).update(status="finished", fingerprint=fingerprints(decimal)[1])
    assert run_status(tmp_path, decimal) == "finished"  # by an earlier version's fingerprint


def test_the_status_of_a_killed_run_has_its_step_and_how_to_resume(tmp_path: Path) -> None:
    record = Record(tmp_path, compose("train.max_steps=9"))
    record.log({"train/loss": 1.0}, 5)
    assert status_text(tmp_path) == "running"
    record.lock.release()
    assert status_text(tmp_path) == f"killed at step 5; resume={tmp_path}"
    record.update(status="finished")
    assert status_text(tmp_path) == "finished"
