"""The trackers that a config names: one option of the group, or a list of several.

Those beside W&B have a section of their own: `tracking.tensorboard`. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.door import Section, plain
from lora_exp.config.ranges import Fault
from lora_exp.errors import did_you_mean

# target -> the package that it needs, and whose name is that of its extra
PACKAGES = {
    "lora_exp.tracking.tensorboard.TensorBoard": "tensorboard",
    "lora_exp.tracking.mlflow.MLflow": "mlflow",
    "lora_exp.tracking.trackio.Trackio": "trackio",
}
WANDB = "lora_exp.tracking.wandb.Wandb"
WANDB_MODES = ("online", "offline", "disabled", "dryrun")  # values of the variable WANDB_MODE


def tracker_keys(node: Mapping[str, Any] | None) -> list[str]:
    """Return the keys below `tracking` that hold a tracker; empty: it is `tracking` itself."""
    if node is None:
        return []
    sections = [key for key, value in node.items() if is_tracker(value)]
    return [*([""] if is_tracker(node) else []), *map(str, sections)]


def is_tracker(value: Any) -> bool:
    """Return whether a value is a section with a `_target_`."""
    return isinstance(value, Mapping | DictConfig) and "_target_" in value


def with_trackers(cfg: DictConfig, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices with that of several trackers, `wandb+tensorboard`: Hydra has none."""
    if "tracking" in choices or "tracking" not in cfg:
        return dict(choices)
    names = [key or "wandb" for key in tracker_keys(cfg.tracking)]
    return {**choices, "tracking": "+".join(names) or "none"}


def tracking_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each tracker whose package is missing, and for W&B's variable."""
    for key in tracker_keys(cfg.tracking):
        node = cfg.tracking[key] if key else cfg.tracking
        if node["_target_"] == WANDB and node.get("mode") == "auto":
            mode = os.environ.get("WANDB_MODE")
            if mode and mode not in WANDB_MODES:
                text = f"the environment's {mode!r} is none of {', '.join(WANDB_MODES)}"
                yield "WANDB_MODE", text + did_you_mean(mode, WANDB_MODES)
        package = PACKAGES.get(str(node["_target_"]))
        if package is not None and find_spec(package) is None:
            text = f'needs the package {package}: pip install "lora-exp[{package}]"'
            yield f"tracking.{key}".rstrip("."), text


def sent_config(cfg: DictConfig) -> dict[str, Any]:
    """Return a run's config as trackers show it: `targets` are what was trained.

    An option of `targets` that no method reads, or that `peft.target_modules` replaces, would be
    wrong in a dashboard.
    """
    values = plain(cfg)
    targets, choices = (values["peft"] or {}).get("target_modules"), dict(values["choices"])
    if targets is None:
        choices.pop("targets", None)
    elif targets != values["targets"]:
        choices["targets"] = ",".join(targets) if isinstance(targets, list) else str(targets)
    return values | {"targets": targets, "choices": choices}
