"""Settings of a sweep in Hydra's section have their effect, or are refused."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.sweeping import sweep_faults, too_long

MINIMIZED = OmegaConf.create({"goal": "minimize", "early_stopping": None})
MAXIMIZED = OmegaConf.create({"goal": "maximize", "early_stopping": None})


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
    (fault,) = sweep_faults(hydra_config(task=("experiment=a",), sweeper=sweeper), None, MINIMIZED)
    assert fault[0] == "hydra.sweeper.params.peft.r"
    assert not list(
        sweep_faults(hydra_config(task=("peft.r=4",), sweeper=sweeper), None, MINIMIZED)
    )
    (single_run_fault,) = sweep_faults(
        hydra_config(RunMode.RUN, ("experiment=a",), sweeper=sweeper), None, MINIMIZED
    )
    assert "add -m" in single_run_fault[1]


def test_a_launcher_of_a_swept_preset_is_refused() -> None:
    job = hydra_config(launcher={"_target_": "joblib", "n_jobs": 2})
    (fault,) = sweep_faults(job, hydra_config(launcher={"_target_": "lockstep"}), MINIMIZED)
    assert fault[0] == "hydra.launcher"
    assert not list(sweep_faults(job, job, MINIMIZED))


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
    (fault,) = sweep_faults(hydra_config(sweeper=sweeper), None, MAXIMIZED)
    assert fault[0] == key
    assert not list(sweep_faults(hydra_config(sweeper=sweeper), None, MINIMIZED))


def test_a_folder_name_of_300_characters_is_refused() -> None:
    assert [key for key, _ in too_long(Path("a") / ("x" * 300))] == ["hydra.sweep.subdir"]
    assert not list(too_long(Path("a") / ("x" * 255)))


@pytest.mark.parametrize("rule", ["halving", "median"])
def test_jobs_that_another_launcher_runs_cannot_be_compared(rule: str) -> None:
    values = {"first_rung": 0.25, "_target_": "x"}
    settings = {"goal": "minimize", "choices": {"early_stopping": rule}, "early_stopping": values}
    cfg = OmegaConf.create(settings)
    joblib = hydra_config(launcher={"_target_": "hydra_plugins.hydra_joblib_launcher.x"})
    (fault,) = sweep_faults(joblib, None, cfg)
    assert fault[0] == "early_stopping"
    assert "hydra/launcher=lockstep" in fault[1]
    ours = hydra_config(launcher={"_target_": "hydra_plugins.lockstep_launcher.launcher.x"})
    assert not list(sweep_faults(ours, None, cfg))
    assert not list(sweep_faults(hydra_config(RunMode.RUN), None, cfg))
