"""A run's directory is consistent at every moment."""

from __future__ import annotations

import json
import os
import platform
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_exp import compose
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError, DivergedError, Interrupted
from lora_exp.files.whole import write_whole
from lora_exp.record.run import Record


def test_every_outcome_is_recorded(tmp_path: Path) -> None:
    for number, (error, status) in enumerate(
        [
            (None, "finished"),
            (ValueError("x"), "failed"),
            (DivergedError("nan"), "diverged"),
            (KeyboardInterrupt(), "interrupted"),
        ]
    ):
        folder = tmp_path / str(number)
        record = Record(folder, compose())
        expected = pytest.raises(type(error)) if error is not None else nullcontext()
        with expected, record.outcome():
            assert json.loads((folder / "run.json").read_text())["status"] == "running"
            if error is not None:
                raise error
        assert json.loads((folder / "run.json").read_text())["status"] == status


def test_a_signal_while_the_record_is_first_written_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, record = os.fsync, tmp_path / "run.json"

    def flush_and_interrupt(descriptor: int) -> None:
        flush(descriptor)
        if record.is_file():
            monkeypatch.undo()
            raise Interrupted

    monkeypatch.setattr(os, "fsync", flush_and_interrupt)
    with pytest.raises(Interrupted):
        Record(tmp_path, compose())
    assert json.loads(record.read_text())["status"] == "interrupted"
    Record(tmp_path, compose(f"resume={tmp_path}"))  # the lock was released


def test_a_record_has_the_times_the_device_and_the_versions_of_its_run(tmp_path: Path) -> None:
    record = Record(tmp_path, compose())
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["ended"] is None
    assert "host" not in values
    assert {"name", "capability"} < values["device"].keys()
    assert values["threads"] == torch.get_num_threads()
    assert values["settings"]["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert values["versions"]["numpy"] == version("numpy")
    with record.outcome():
        pass
    values = json.loads((tmp_path / "run.json").read_text())
    times = [datetime.fromisoformat(values[key]) for key in ("started", "ended")]
    assert times[0] <= times[1] <= datetime.now(UTC)


def test_a_record_names_its_machine_if_asked(tmp_path: Path) -> None:
    cfg = compose("host=true")
    assert fingerprint(cfg) == fingerprint(compose())
    assert cfg.name == compose().name
    record = Record(tmp_path, cfg)
    assert record.values["host"] == platform.node()
    record.lock.release()
    compose(f"resume={tmp_path}", "host=false")  # it does not affect the result


def test_other_conditions_than_at_the_start_are_logged_on_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Record(tmp_path, compose()).lock.release()
    path = tmp_path / "run.json"
    values = json.loads(path.read_text())
    values["versions"]["torch"], values["threads"] = "1.0", 64
    values["device"]["name"] = "Z80"
    path.write_text(json.dumps(values))
    Record(tmp_path, compose(f"resume={tmp_path}")).begin()
    (message,) = caplog.messages
    assert "device name Z80 -> " in message
    assert f"threads 64 -> {torch.get_num_threads()}, torch 1.0 -> " in message


def test_a_resumed_record_keeps_its_values(tmp_path: Path) -> None:
    first = Record(tmp_path, compose())
    first.update(metrics={"a": 1})
    first.lock.release()
    resumed = Record(tmp_path, compose(f"resume={tmp_path}"))
    resumed.update(metrics={"b": 2})
    assert resumed.values["tracking_id"] == first.values["tracking_id"]
    assert resumed.values["metrics"] == {"a": 1, "b": 2}


def test_a_directory_with_a_run_is_refused_for_another(tmp_path: Path) -> None:
    Record(tmp_path / "a", compose())
    with pytest.raises(ConfigError, match="holds a run already"):
        Record(tmp_path / "a", compose())
    with pytest.raises(ConfigError, match="goes on in place"):
        Record(tmp_path / "b", compose(f"resume={tmp_path / 'a'}"))
    assert not (tmp_path / "b").exists()


def test_metrics_are_lines_and_can_be_rewound(tmp_path: Path) -> None:
    record = Record(tmp_path, compose())
    for step in (1, 2, 3):
        record.log({"train/loss": 0.5}, step)
    record.rewind(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_the_record_names_versions_and_choices(tmp_path: Path) -> None:
    values = Record(tmp_path, compose()).values
    assert {"torch", "transformers", "peft", "trl", "lora-exp", "python"} <= set(values["versions"])
    assert values["choices"]["peft"] == "lora"
