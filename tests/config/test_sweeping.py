"""Settings of a sweep in Hydra's section have their effect, or are refused."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.sweeping import sweep_faults, too_long


class Direction(Enum):
    """As in Optuna's sweeper, whose default it is."""

    minimize = 1
    maximize = 2


def hydra_config(
    mode: RunMode = RunMode.MULTIRUN, task: tuple[str, ...] = (), **sections: Any
) -> DictConfig:
    values = {"mode": mode, "overrides": {"task": list(task)}, "sweeper": {}, "launcher": {}}
    return OmegaConf.create(values | sections)


def test_a_sweep_of_a_preset_without_effect_is_refused() -> None:
    sweeper = {"params": {"peft.r": "4,8"}}
    (fault,) = sweep_faults(hydra_config(task=("experiment=a",), sweeper=sweeper), None, "minimize")
    assert fault[0] == "hydra.sweeper.params.peft.r"
    assert not list(
        sweep_faults(hydra_config(task=("peft.r=4",), sweeper=sweeper), None, "minimize")
    )
    (single_run_fault,) = sweep_faults(
        hydra_config(RunMode.RUN, ("experiment=a",), sweeper=sweeper), None, "minimize"
    )
    assert "add -m" in single_run_fault[1]


def test_a_launcher_of_a_swept_preset_is_refused() -> None:
    job = hydra_config(launcher={"_target_": "joblib", "n_jobs": 2})
    (fault,) = sweep_faults(job, hydra_config(launcher={"_target_": "lockstep"}), "minimize")
    assert fault[0] == "hydra.launcher"
    assert not list(sweep_faults(job, job, "minimize"))


@pytest.mark.parametrize(
    ("sweeper", "key"),
    [
        ({"direction": "minimize"}, "hydra.sweeper.direction"),
        ({"direction": Direction.minimize}, "hydra.sweeper.direction"),
        ({"optim": {"maximize": False}}, "hydra.sweeper.optim.maximize"),
        ({"ax_config": {"experiment": {"minimize": True}}},
         "hydra.sweeper.ax_config.experiment.minimize"),
    ],
)  # fmt: skip
def test_a_sweeper_that_optimizes_in_the_wrong_direction_is_refused(
    sweeper: dict[str, Any], key: str
) -> None:
    (fault,) = sweep_faults(hydra_config(sweeper=sweeper), None, "maximize")
    assert fault[0] == key
    assert not list(sweep_faults(hydra_config(sweeper=sweeper), None, "minimize"))


def test_a_folder_name_of_300_characters_is_refused() -> None:
    assert [key for key, _ in too_long(Path("a") / ("x" * 300))] == ["hydra.sweep.subdir"]
    assert not list(too_long(Path("a") / ("x" * 255)))
