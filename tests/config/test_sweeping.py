"""What Hydra's own section says of a sweep acts, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.sweeping import sweeping, too_long


def about(mode: RunMode = RunMode.MULTIRUN, task: tuple[str, ...] = (), **own: Any) -> DictConfig:
    values = {"mode": mode, "overrides": {"task": list(task)}, "sweeper": {}, "launcher": {}}
    return OmegaConf.create(values | own)


def test_a_presets_sweep_that_does_not_act_is_refused() -> None:
    sweeper = {"params": {"peft.r": "4,8"}}
    (fault,) = sweeping(about(task=("experiment=a",), sweeper=sweeper), None, "minimize")
    assert fault[0] == "hydra.sweeper.params.peft.r"
    assert not list(sweeping(about(task=("peft.r=4",), sweeper=sweeper), None, "minimize"))
    (alone,) = sweeping(about(RunMode.RUN, ("experiment=a",), sweeper=sweeper), None, "minimize")
    assert "add -m" in alone[1]


def test_a_launcher_of_a_swept_preset_is_refused() -> None:
    job = about(launcher={"_target_": "joblib", "n_jobs": 2})
    (fault,) = sweeping(job, about(launcher={"_target_": "lockstep"}), "minimize")
    assert fault[0] == "hydra.launcher"
    assert not list(sweeping(job, job, "minimize"))


@pytest.mark.parametrize(
    ("sweeper", "key"),
    [
        ({"direction": "minimize"}, "hydra.sweeper.direction"),
        ({"optim": {"maximize": False}}, "hydra.sweeper.optim.maximize"),
        ({"ax_config": {"experiment": {"minimize": True}}},
         "hydra.sweeper.ax_config.experiment.minimize"),
    ],
)  # fmt: skip
def test_a_sweeper_that_looks_for_the_worst_is_refused(sweeper: dict[str, Any], key: str) -> None:
    (fault,) = sweeping(about(sweeper=sweeper), None, "maximize")
    assert fault[0] == key
    assert not list(sweeping(about(sweeper=sweeper), None, "minimize"))


def test_a_folders_name_of_300_letters_is_refused() -> None:
    assert [key for key, _ in too_long(Path("a") / ("x" * 300))] == ["hydra.sweep.subdir"]
    assert not list(too_long(Path("a") / ("x" * 255)))
