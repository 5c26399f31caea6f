"""Two runs are alike in every byte of their weights and every number but times."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.after.likeness import likeness


@pytest.fixture
def pair(trained: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A run, and a copy of it that may be changed."""
    run = trained("peft=lora")
    return run, Path(shutil.copytree(run, tmp_path / "copy"))


def edit_lines(run: Path, step: int, **values: Any) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    edited = [line | (values if line["step"] == step else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))


def edit_record(run: Path, **values: Any) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_times_and_memory_are_not_compared(pair: tuple[Path, Path]) -> None:
    run, copy = pair
    metrics = json.loads((copy / "run.json").read_text())["metrics"]
    timed = {"seconds": 9e9, "train/tokens_per_s": 1.0, "peak_bytes": 0.0}
    edit_record(copy, metrics=metrics | timed)
    edit_lines(copy, 10, **{"train/tokens_per_s": 1.0})
    result = likeness(run, copy)
    assert result.same
    assert result.files == len(list((run / "adapter").iterdir()))
    assert result.numbers > 20


def test_each_difference_is_named(pair: tuple[Path, Path]) -> None:
    run, copy = pair
    (copy / "adapter/README.md").unlink()
    (copy / "adapter/more.json").touch()
    (copy / "adapter/adapter_config.json").write_text("{}")
    assert likeness(run, copy).weights == [
        "adapter/README.md is missing in the new one",
        "adapter/adapter_config.json differs",
        "adapter/more.json is only in the new one",
    ]
    edit_lines(copy, 10, **{"train/loss": 0.5})
    (copy / "samples.jsonl").write_text("")
    (copy / "row_losses.json").write_text("{}")
    edit_record(copy, base="sha256:0")
    result = likeness(run, copy)
    loss, answers, losses = result.metrics
    assert loss.startswith("train/loss at step 10: ")
    assert loss.endswith(", now 0.5")
    assert (answers, losses) == ("samples.jsonl: other answers", "row_losses.json: other losses")
    (copy / "pairs.json").write_text("{}")
    assert likeness(copy, run).metrics[-1] == "pairs.json: other preferences"
    (copy / "pairs.json").unlink()
    (copy / "row_losses.json").unlink()  # as if trained by an earlier version
    assert len(likeness(copy, run).metrics) == 2
    assert result.inputs[0].endswith("now sha256:0")
