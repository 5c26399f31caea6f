"""Keys that `~key` takes out of a config: left to the trainer's own default, or required."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.overrides import parted
from lora_exp.config.signature import signature
from lora_exp.errors import ConfigError


def restored(cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Return a config in which each deleted key has the default of the class that takes it.

    Args:
        cfg: as Hydra composed it.
        choices: the options that it composed.
        overrides: the command line's.

    Raises:
        ConfigError: a key without which there is no run.
    """
    deleted = [parted(override)[0] for override in overrides if override.startswith("~")]
    keys = [k for k in deleted if not (k in choices or "/" in k or "@" in k)]
    if not keys:
        return cfg
    made, faults = copy.deepcopy(cfg), list[tuple[str, str]]()
    OmegaConf.set_readonly(made, False)
    for key in keys:
        if _holds(made, key):
            continue  # another override has put it back
        default = _default(made, key)
        if default is None:
            faults.append((key, f"is required; give {key}=..., or leave it as it is"))
        else:
            OmegaConf.update(made, key, ast.literal_eval(default), force_add=True)
    if faults:
        raise ConfigError(faults)
    return made


def _holds(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node


def _default(cfg: DictConfig, key: str) -> ast.expr | None:
    """Return the default of an argument, where its class or function writes one down."""
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, "algorithm.args" if section == "train" else section or "_")
    known = signature(str(node.get("_target_"))) if isinstance(node, DictConfig) else None
    default = known.defaults.get(name) if known else None
    try:
        ast.literal_eval(default or "")
    except (ValueError, SyntaxError):
        return None
    return default
