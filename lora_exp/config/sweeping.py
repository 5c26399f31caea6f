"""Checks Hydra's section of a sweep: settings without effect, or against the run's goal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import Section
from lora_exp.config.overrides import split_override
from lora_exp.config.ranges import Fault

OURS = "hydra_plugins.lockstep_launcher"
MAX_NAME_BYTES = 255  # of a folder's name, on every common file system


def sweep_faults(hydra: DictConfig, master: DictConfig | None, cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each setting of a sweep that has no effect, or opposes the goal.

    Args:
        hydra: the `hydra` section of one job.
        master: that of the whole sweep, if it is known.
        cfg: the job's settled values.
    """
    overridden = {split_override(override)[0] for override in hydra.overrides.task}
    params = (hydra.sweeper.get("params") or {}) if hydra.get("sweeper") else {}
    swept = [key for key in params if split_override(f"{key}=")[0] not in overridden]
    is_sweep = hydra.mode == RunMode.MULTIRUN
    if swept:
        if is_sweep:
            text = "a preset's sweep has no effect in a sweep over presets; launch it by itself"
        else:
            text = "belongs to a sweep, and this is a single run; add -m, or hydra.mode: MULTIRUN"
        yield f"hydra.sweeper.params.{swept[0]}", text
    for key in ("launcher", "sweeper._target_"):
        if master is not None and OmegaConf.select(hydra, key) != OmegaConf.select(master, key):
            text = "a preset's has no effect in a sweep over presets; give it on the command"
            yield f"hydra.{key.partition('.')[0]}", f"{text} line, or launch the preset by itself"
    if is_sweep and (opposing := _opposing_key(hydra, cfg.goal)):
        yield opposing, f"is against goal={cfg.goal}: the sweeper would look for the worst"
    launcher = str(OmegaConf.select(hydra, "launcher._target_"))
    if is_sweep and "first_rung" in (cfg.early_stopping or {}) and not launcher.startswith(OURS):
        text = f"{cfg.choices.early_stopping} compares jobs, and this launcher runs each by itself"
        yield "early_stopping", f"{text}; hydra/launcher=lockstep, which is the default"


def too_long(directory: Path) -> Iterator[Fault]:
    """Yield a fault for each part of a path whose name is too long for a file system."""
    for part in directory.parts:
        if len(part.encode()) > MAX_NAME_BYTES:
            text = f"a folder's name has {len(part.encode())} bytes; {MAX_NAME_BYTES} are possible"
            yield "hydra.sweep.subdir", text


def _opposing_key(hydra: DictConfig, goal: str) -> str | None:
    """Return the key that makes the sweeper optimise against the goal; None: there is none."""
    direction = OmegaConf.select(hydra, "sweeper.direction")  # Optuna's: its enum, or a word
    direction = getattr(direction, "name", direction)
    if isinstance(direction, str) and direction.rpartition(".")[2] != goal:
        return "hydra.sweeper.direction"
    for key, meaning in (
        ("optim.maximize", "maximize"),
        ("ax_config.experiment.minimize", "minimize"),
    ):
        value = OmegaConf.select(hydra, f"sweeper.{key}")
        if isinstance(value, bool) and value != (goal == meaning):
            return f"hydra.sweeper.{key}"
    return None
