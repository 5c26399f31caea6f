"""What Hydra's own section says of a sweep, held against what really launches and sorts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.overrides import parted
from lora_exp.config.ranges import Fault

LONGEST = 255  # bytes of a folder's name, on every common file system


def sweeping(about: DictConfig, master: DictConfig | None, goal: str) -> Iterator[Fault]:
    """Yield a fault for each setting of a sweep that would not act, or that acts against the goal.

    Args:
        about: the `hydra` section of one job.
        master: that of the whole sweep, where it is known.
        goal: of the job's config.
    """
    given = {parted(override)[0] for override in about.overrides.task}
    params = (about.sweeper.get("params") or {}) if about.get("sweeper") else {}
    swept = [key for key in params if parted(f"{key}=")[0] not in given]
    several = about.mode == RunMode.MULTIRUN
    if swept:
        text = "a preset's sweep does not act where presets are swept over; launch it by itself"
        alone = "is a sweep's, and this is a single run; add -m, or hydra.mode: MULTIRUN"
        yield f"hydra.sweeper.params.{swept[0]}", text if several else alone
    for key in ("launcher", "sweeper._target_"):
        if master is not None and OmegaConf.select(about, key) != OmegaConf.select(master, key):
            text = "a preset's does not act where presets are swept over; give it on the command"
            yield f"hydra.{key.partition('.')[0]}", f"{text} line, or launch the preset by itself"
    if several and (wrong := _against(about, goal)):
        yield wrong, f"is against goal={goal}: the sweeper would look for the worst"


def too_long(directory: Path) -> Iterator[Fault]:
    """Yield a fault if a job's directory has a name that no file system takes."""
    for part in directory.parts:
        if len(part.encode()) > LONGEST:
            text = f"a folder's name of {len(part.encode())} bytes; {LONGEST} are possible"
            yield "hydra.sweep.subdir", text


def _against(about: DictConfig, goal: str) -> str | None:
    """Return the key by which a sweeper looks for the other end of the objective, if it does."""
    direction = OmegaConf.select(about, "sweeper.direction")  # Optuna's
    if isinstance(direction, str) and direction.rpartition(".")[2] != goal:
        return "hydra.sweeper.direction"
    for key, means in (
        ("optim.maximize", "maximize"),
        ("ax_config.experiment.minimize", "minimize"),
    ):
        value = OmegaConf.select(about, f"sweeper.{key}")
        if isinstance(value, bool) and value != (goal == means):
            return f"hydra.sweeper.{key}"
    return None
