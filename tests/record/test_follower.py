"""The record of a run's other processes: it has what the first one has, and writes nothing."""

from __future__ import annotations

from pathlib import Path

from lora_exp.record.follower import Follower


def test_it_keeps_changes_to_itself(tmp_path: Path) -> None:
    record = Follower(tmp_path, {"metrics": {"before/loss": 2.0}, "tracking_id": "ab", "data": "x"})
    with record.outcome():
        record.begin()
        record.update(steps=3, metrics={"eval/loss": 1.0})
        record.log({"train/loss": 1.0}, 1)
        record.rewind(1)
        record.write_samples([{"prompt": "a"}])
        record.check_unchanged("data", "x")
    assert record.values["metrics"] == {"before/loss": 2.0, "eval/loss": 1.0}
    assert record.values["steps"] == 3
    assert record.samples() == []
    assert list(tmp_path.iterdir()) == []
