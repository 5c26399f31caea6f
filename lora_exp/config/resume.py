"""What a run may be told when it goes on: to train longer, and to report otherwise.

Everything else shapes the result, which would then be no run's. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.overrides import parted
from lora_exp.errors import ConfigError

ITSELF = re.compile(r"(resume|trusted_targets|retry_failed|strict)$|hydra\b")
REPORTS = re.compile(r"tracking\b|lockstep\.(max_jobs|verify|on_difference)$|train\.logging_\w+$")
SAVING = re.compile(r"train\.(save|eval)_\w+$")  # shapes the result where the best is loaded
LONGER = ("train.max_steps", "train.num_train_epochs")
ABSENT = object()


def continued(
    saved: dict[str, Any],
    asked: DictConfig,
    choices: Mapping[str, Any],
    overrides: Iterable[str],
) -> dict[str, Any]:
    """Return a saved run's config with what it may be told anew.

    Args:
        saved: the run's config.yaml.
        asked: what the command line composed, its defaults included.
        choices: the options that it composed.
        overrides: the command line's own words; only they count.

    Raises:
        ConfigError: every difference that would shape the result.
    """
    values = OmegaConf.create(saved)
    faults = []
    best = bool(saved["train"].get("load_best_model_at_end"))
    for override in overrides:
        key = parted(override)[0].replace("/", ".")
        if ITSELF.match(key):
            continue
        if override.startswith("~"):
            faults.append((key, "is the run's, and cannot be taken out of it; leave it out"))
            continue
        if "@" in key:
            faults.append((key, "puts an option where the run has its own; leave it out"))
            continue
        group = key in choices
        was = saved["choices"].get(key, ABSENT) if group else OmegaConf.select(values, key)
        wanted = choices[key] if group else _resolved(asked, key)
        if wanted == was or (group and wanted is None and was is ABSENT):
            continue
        if REPORTS.match(key) or (SAVING.match(key) and not best):
            OmegaConf.update(values, key, _resolved(asked, key), force_add=True, merge=False)
            if group:
                values.choices[key] = wanted
        elif key in LONGER and _longer(was, wanted):
            OmegaConf.update(values, key, wanted)
        else:
            faults.append((key, _told(key, wanted, was)))
    if faults:
        raise ConfigError(faults)
    found: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any], key: str = "") -> dict[str, list[Any]]:
    """Return what differs between two configs: key -> [before, after]."""
    found: dict[str, list[Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        full = f"{key}.{name}".lstrip(".")
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found |= changes(was, now, full)
        elif was != now:
            found[full] = [was, now]
    return found


def _resolved(asked: DictConfig, key: str) -> Any:
    value = OmegaConf.select(asked, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _longer(was: Any, wanted: Any) -> bool:
    """Say whether a limit is raised; -1 steps are no limit, but epochs."""
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (was, wanted))
    return numbers and 0 < was < wanted


def _told(key: str, wanted: Any, was: Any) -> str:
    was = "nothing" if was is ABSENT else was
    if key in LONGER:
        return f"{wanted}, but the run was started with {was}; it can only be raised"
    return f"{wanted}, but the run was started with {was}; leave it out, or start a new run"
