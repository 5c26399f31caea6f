"""Spaces of overrides, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lora_exp.search.limits import Limits
from lora_exp.search.presence import Presence
from lora_exp.search.settings import Settings
from lora_exp.search.space import Space, read_space

DEFAULTS: dict[str, Any] = {
    "trials": None, "sampler": "tpe", "seed": 1, "batch": 4, "direction": None, "start": [],
    "learn_from": [], "dry_run": False, "params": None, "objectives": None, "max_parameters": None,
    "max_bytes": None,
}  # fmt: skip


def space_of(*overrides: str, groups: Sequence[str] = ()) -> Space:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return read_space(parsed, {o.key_or_group: o.key_or_group in groups for o in parsed})


def presence_of(space: Space, configs: Mapping[str, Any] | None = None) -> Presence:
    """Return the presence of keys; `configs` has the config of each option of the first group."""

    def compose(overrides: list[str]) -> DictConfig:
        options = dict(o.split("=") for o in overrides)
        return OmegaConf.create((configs or {})[options[space.groups[0]]])

    return Presence(space, compose)


def settings_of(**values: Any) -> Settings:
    section = DEFAULTS | {"direction": "minimize"} | values
    names = ("trials", "sampler", "seed", "batch", "direction")
    start, learn_from = tuple(section["start"]), tuple(section["learn_from"])
    objectives = section["objectives"] or {}
    limits = Limits(section["max_parameters"], section["max_bytes"])
    return Settings(*(section[name] for name in names), start, learn_from, objectives, limits)
