"""What may change when a run is resumed: a longer training, how it reports, and processes.

Everything else affects the result, which would then belong to neither config. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.keep import evaluations_act
from lora_exp.config.overrides import split_override
from lora_exp.errors import ConfigError

NOT_SAVED = re.compile(r"(resume|trusted_targets|retry_failed|report|strict)$|hydra\b")
REPORTS = re.compile(
    r"(host|tracking|early_stopping|sweep_name)\b|lockstep\.(max_jobs|verify|on_difference)$"
    r"|train\.logging_\w+$|data\.num_proc$"
)
# these affect the result if evaluations do
SAVING = re.compile(r"train\.(save|eval)_\w+$")
LIMITS = ("train.max_steps", "train.num_train_epochs")
ABSENT = object()


def resumed_config(
    saved: dict[str, Any],
    requested: DictConfig,
    choices: Mapping[str, Any],
    overrides: Iterable[str],
) -> dict[str, Any]:
    """Return a saved run's config with the overrides that may change on resume.

    Args:
        saved: the run's config.yaml.
        requested: the config composed from the command line, with its defaults.
        choices: the option of each group in it.
        overrides: those of the command line; only these keys are compared.

    Raises:
        ConfigError: overrides would affect the result (all are listed).
    """
    values = OmegaConf.create(saved)
    faults = []
    for override in overrides:
        key = split_override(override)[0].replace("/", ".")
        if NOT_SAVED.match(key):
            continue
        if override.startswith("~"):
            faults.append((key, "cannot be deleted from the config of a run; leave it out"))
            continue
        if "@" in key:
            faults.append((key, "would replace an option of the run; leave it out"))
            continue
        group = key in choices
        saved_value = saved["choices"].get(key, ABSENT) if group else OmegaConf.select(values, key)
        new_value = choices[key] if group else _resolved(requested, key)
        if new_value == saved_value or (group and new_value is None and saved_value is ABSENT):
            continue
        if _only_reports(key, saved):
            OmegaConf.update(values, key, _resolved(requested, key), force_add=True, merge=False)
            if group:
                values.choices[key] = new_value
        elif key in LIMITS and _is_raised(saved_value, new_value):
            OmegaConf.update(values, key, new_value)
        else:
            faults.append((key, _difference_text(key, new_value, saved_value)))
    if faults:
        raise ConfigError(faults)
    resumed: dict[str, Any] = OmegaConf.to_container(values)  # type: ignore[assignment]
    return resumed


def _only_reports(key: str, saved: Mapping[str, Any]) -> bool:
    """Return whether a key of a run with this config does not affect its result."""
    if not evaluations_act(saved):
        return bool(REPORTS.match(key) or SAVING.match(key))
    train = saved["train"]
    if key == "train.logging_steps" and train.get("eval_strategy") == "steps":
        return bool(train.get("eval_steps"))  # without it, rows are evaluated at these steps
    return bool(REPORTS.match(key))


def acting_limit(train: Mapping[str, Any]) -> str:
    """Return the name of the limit that ends a training: epochs do not count beside max_steps."""
    return "max_steps" if train["max_steps"] > 0 else "num_train_epochs"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], key: str = "") -> dict[str, list[Any]]:
    """Return what differs between two configs: key -> [before, after]."""
    differences: dict[str, list[Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        full_key = f"{key}.{name}".lstrip(".")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences |= changes(before, after, full_key)
        elif before != after:
            differences[full_key] = [before, after]
    return differences


def _resolved(requested: DictConfig, key: str) -> Any:
    value = OmegaConf.select(requested, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _is_raised(saved_value: Any, new_value: Any) -> bool:
    """Return whether a limit is raised; max_steps=-1 is not a limit, epochs limit the run then."""
    limits = saved_value, new_value
    are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in limits)
    return are_numbers and 0 < saved_value < new_value


def _difference_text(key: str, new_value: Any, saved_value: Any) -> str:
    saved_text = "nothing" if saved_value is ABSENT else saved_value
    text = f"{new_value}, but the run was started with {saved_text}"
    if key in LIMITS:
        return f"{text}; it can only be raised"
    return f"{text}; leave it out, or start a new run"
