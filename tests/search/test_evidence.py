"""Finished sweeps as evidence: only jobs of the same objective, and in the space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_exp.errors import ConfigError
from lora_exp.search.evidence import read_evidence
from lora_exp.search.trial import Trial
from tests.search.spaces import presence_of, settings_of, space_of

SPACE = space_of("peft=lora,ia3", "peft.r=4,8", "train.rate=interval(0,1)", groups=["peft"])
PRESENCE = presence_of(SPACE, {"lora": {"peft": {"r": 1}, "train": {"rate": 1}},
                               "ia3": {"peft": {}, "train": {"rate": 1}}})  # fmt: skip


def job(folder: Path, name: str, value: float, rate: float, **changes: Any) -> None:
    """Write a job with rank 8 in its config only, and its rate also as an override."""
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra" / "overrides.yaml").write_text(yaml.dump([f"train.rate={rate}"]))
    method = changes.pop("method", "lora")
    config = {"choices": {"peft": method}, "peft": {"r": 8}, "train": {"rate": rate}}
    (folder / name / "config.yaml").write_text(yaml.dump(config))
    record = {"status": "finished", "objective": "eval/loss", "goal": "minimize", "error": None,
              "metrics": {"eval/loss": value}} | changes  # fmt: skip
    (folder / name / "run.json").write_text(json.dumps(record))


def read(folder: Path, **values: Any) -> list[Trial]:
    settings = settings_of(learn_from=[str(folder)], **values)
    return read_evidence(settings, PRESENCE, lambda values: None, "eval/loss")


def test_values_come_from_overrides_and_from_the_config(tmp_path: Path) -> None:
    job(tmp_path, "10", 0.25, 0.5)
    job(tmp_path, "9", 0.5, 0.25, method="ia3")
    assert read(tmp_path) == [
        Trial({"peft": "ia3", "train.rate": "0.25"}, "complete", 0.5),
        Trial({"peft": "lora", "peft.r": "8", "train.rate": "0.5"}, "complete", 0.25),
    ]


def test_jobs_outside_the_space_or_of_another_objective_are_left_out(tmp_path: Path) -> None:
    job(tmp_path, "0", 0.25, 0.5)
    job(tmp_path, "1", 0.25, 2.0)
    job(tmp_path, "2", 0.25, 0.5, method="dora")
    job(tmp_path, "3", 0.25, 0.5, status="failed")
    job(tmp_path, "5", 0.25, 0.5, status="pruned")
    job(tmp_path, "4", 0.25, 0.5, objective="train/loss", metrics={"train/loss": 1.0})
    assert len(read(tmp_path)) == 1
    with pytest.raises(ConfigError, match="was judged by eval/loss \\(maximize\\) and lies in"):
        read(tmp_path, direction="maximize")


def test_a_folder_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn_from: .*nowhere holds no jobs of a sweep"):
        read(tmp_path / "nowhere")


def test_jobs_need_all_objectives_to_be_evidence(tmp_path: Path) -> None:
    counts = {"counts": {"trainable_parameters": 7}}
    job(tmp_path, "0", 0.5, 0.25, metrics={"eval/loss": 0.5, "eval/kl": 2.0}, **counts)
    job(tmp_path, "1", 0.25, 0.5, **counts)
    objectives = {"eval/loss": "minimize", "parameters": "minimize", "eval/kl": "minimize"}
    (trial,) = read(tmp_path, objectives=objectives)
    assert (trial.objectives, trial.values["train.rate"]) == ([0.5, 7.0, 2.0], "0.25")
