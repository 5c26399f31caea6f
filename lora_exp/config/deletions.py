"""Keys that `~key` deletes from a config get their class's default; required keys are refused."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.overrides import split_override
from lora_exp.config.signature import signature
from lora_exp.errors import ConfigError


def restore_defaults(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]
) -> DictConfig:
    """Return a config in which each deleted key has the default of the class that reads it.

    Args:
        cfg: as Hydra composed it.
        choices: the option of each group.
        overrides: those of the command line.

    Raises:
        ConfigError: a deleted key is required.
    """
    deleted = [split_override(override)[0] for override in overrides if override.startswith("~")]
    keys = [k for k in deleted if not (k in choices or "/" in k or "@" in k)]
    if not keys:
        return cfg
    restored, faults = copy.deepcopy(cfg), list[tuple[str, str]]()
    OmegaConf.set_readonly(restored, False)
    for key in keys:
        if _holds(restored, key):
            continue  # another override has set it again
        default = _default(restored, key)
        if default is None:
            faults.append((key, f"is required; give {key}=..., or do not delete it"))
        else:
            OmegaConf.update(restored, key, ast.literal_eval(default), force_add=True)
    if faults:
        raise ConfigError(faults)
    return restored


def _holds(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node


def _default(cfg: DictConfig, key: str) -> ast.expr | None:
    """Return the default of an argument, if the source of its class or function has one."""
    section, _, argument = key.rpartition(".")
    node = OmegaConf.select(cfg, "algorithm.args" if section == "train" else section or "_")
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    target_signature = signature(str(target))
    default = target_signature.defaults.get(argument) if target_signature else None
    try:
        ast.literal_eval(default or "")
    except (ValueError, SyntaxError):
        return None
    return default
