"""Completes a run's config: plain read-only values with a directory, a name and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config.deletions import restore_defaults
from lora_exp.config.door import plain, renamed, with_oldest_names
from lora_exp.config.keep import (
    LOAD_BEST,
    apply_keep,
    evaluations_act,
    goal_of,
    has_patience,
    saves_each_best,
)
from lora_exp.config.naming import run_name
from lora_exp.config.overrides import split_override
from lora_exp.config.processes import process_count, with_processes
from lora_exp.config.resume import resumed_config
from lora_exp.config.start import with_start_adapter
from lora_exp.config.trackers import with_trackers
from lora_exp.errors import ConfigError
from lora_exp.files.paths import near_names

GROUPS = (
    "model", "quant", "peft", "targets", "algorithm", "data", "tracking", "early_stopping",
    "parallel",
)  # one option each  # fmt: skip
# keys that do not change what a run computes: its name, where it reports, what it may import
NOT_COMPUTED = (
    "name", "sweep_name", "adapter_base", "choices", "tracking", "resume", "retry_failed", "strict",
    "host", "trusted_targets", "report",
    "lockstep", "keep",  # hashed as lockstep_mode and train.load_best_model_at_end
)  # fmt: skip
SWITCHES = {"deterministic": True, "batch_invariant": False}  # which earlier versions did not write


def product(*factors: float) -> float:
    """Multiply numbers, rounded so that 2e-5 * 10 is written as 0.0002.

    Returns:
        An int if all factors are ints, as peft requires of lora_alpha: `${product:2,${peft.r}}`.
    """
    if all(isinstance(factor, int) for factor in factors):
        return math.prod(factors)
    return float(f"{math.prod(float(factor) for factor in factors):.12g}")


def resumed_path(resume: Any) -> str | None:
    """Return the key `resume` as a path, None if it is empty; a sweep's job may be named 0.

    Raises:
        ConfigError: it is no path.
    """
    if resume is None or resume == "":
        return None
    if not isinstance(resume, str | int):
        raise ConfigError([("resume", "is the directory of one run or sweep; give resume=PATH")])
    return str(resume)


def run_dir(resume: Any) -> str:
    """Return the directory of a run: a new one, or that of the run to resume.

    Raises:
        ConfigError: there is no run to resume.
    """
    resume = resumed_path(resume)
    if resume and not (Path(resume) / "config.yaml").is_file():
        run = Path(resume).resolve().parent.parent
        if Path(resume).is_dir() and (run / "config.yaml").is_file():
            text = f"{resume} is a checkpoint; resume={run} goes on from the run's newest"
            raise ConfigError([("resume", text)])
        if Path(resume).is_file():
            raise ConfigError([("resume", f"{resume} is a file; give the directory of a run")])
        near = near_names(Path(resume))
        raise ConfigError([("resume", f"no run in {resume}: it has no config.yaml{near}")])
    return resume or f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}"


def hydra_subdir(resume: Any, directory: str | None) -> str:
    """Return the folder for Hydra's files: those of a run's launch stay when it is resumed."""
    holds_run = directory is not None and (Path(directory) / "run.json").is_file()
    return ".hydra/resumed" if holds_run or resumed_path(resume) else ".hydra"


OmegaConf.register_new_resolver("product", product, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, use_cache=True, replace=True)
OmegaConf.register_new_resolver("hydra_subdir", hydra_subdir, replace=True)


@dataclass(frozen=True)
class Resolved:
    """A composed config as plain values, and the options of its groups."""

    values: dict[str, Any]
    choices: dict[str, Any]
    takes_goal: bool = False  # from its algorithm
    is_resumed: bool = False


def settled_values(
    cfg: DictConfig,
    choices: Mapping[str, Any],
    overrides: Iterable[str],
    common: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Resolve a composed config into plain values, with its choices and its name.

    Args:
        cfg: as Hydra composed it, without Hydra's own section.
        choices: the option of each group.
        overrides: those of the command line.
        common: keys that all jobs of the sweep share, left out of the name; None: no sweep.

    Raises:
        ConfigError: a required value is missing, or an interpolation has no target.
    """
    overrides = list(overrides)
    return completed(resolved(cfg, choices, overrides), overrides, common)


def resolved(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> Resolved:
    """Return a config's plain values; see `settled_values`, of which this is the first half.

    Of the overrides only keys matter here, unless it resumes a run.
    """
    choices = with_trackers(cfg, choices)
    if cfg.trusted_targets and not any(o.startswith("trusted_targets=") for o in overrides):
        raise ConfigError(
            [("trusted_targets", "only the command line may trust a target, not a file")]
        )
    if resumed_path(cfg.resume):
        return Resolved(_resumed(cfg, choices, overrides), choices, is_resumed=True)
    if missing_groups := [group for group in GROUPS if group not in choices]:
        text = "give one option, like {0}=NAME; several of them are a sweep: -m {0}=A,B"
        raise ConfigError((group, text.format(group)) for group in missing_groups)
    _check_demo(choices, overrides)
    cfg = restore_defaults(cfg, choices, overrides)
    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError([(str(error.full_key), str(error).splitlines()[0])]) from error
    if _is_missing(values) and (missing := OmegaConf.missing_keys(cfg)):
        raise ConfigError((key, f"is required; give {key}=...") for key in sorted(missing))
    return Resolved(values, choices, OmegaConf.is_interpolation(cfg, "goal"))


def completed(
    resolved: Resolved, overrides: Sequence[str], common: Iterable[str] | None
) -> dict[str, Any]:
    """Return the values of a run, with its choices and its name; see `settled_values`."""
    if resolved.is_resumed:
        return resolved.values
    choices = resolved.choices
    values = with_processes(renamed(resolved.values)) | {"resume": None}
    if resolved.takes_goal:  # then it is its own objective's
        values["goal"] = goal_of(values["objective"]) or values["goal"]
    _check_consent(values, overrides)
    values = apply_keep(with_start_adapter(values, overrides), overrides)
    values["choices"] = {k: v for k, v in choices.items() if "/" not in k and v is not None}
    values["name"] = values["name"] or run_name(values, overrides, common)
    return values


def _check_demo(choices: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Refuse `data.path` with data=demo: the demo's held-out rows would evaluate other data."""
    keys = {split_override(override)[0] for override in overrides}
    if "data.path" in keys and "data.eval_path" not in keys and choices["data"] == "demo":
        text = "data=demo holds out its own rows; give data=jsonl data.path=..., or data.eval_path"
        raise ConfigError([("data.path", f"{text}, too")])


def _check_consent(values: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Refuse what only the command line may allow: a model's own code, another base's name."""
    model = values.get("model") or {}
    if model.get("trust_remote_code") and "model.trust_remote_code=true" not in overrides:
        text = "runs code that came with the model; only the command line may allow it"
        raise ConfigError([("model.trust_remote_code", text)])
    given = {split_override(override)[0] for override in overrides}
    if values.get("adapter_base") is not None and "adapter_base" not in given:
        text = "says that two bases are the same; only the command line may say so"
        raise ConfigError([("adapter_base", text)])


def _resumed(
    cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]
) -> dict[str, Any]:
    """Return the config that a run was started with, with the overrides that may change."""
    saved = OmegaConf.load(Path(run_dir(cfg.resume)) / "config.yaml")
    values: dict[str, Any] = OmegaConf.to_container(saved)  # type: ignore[assignment]
    values = resumed_config(renamed(values), cfg, choices, overrides)
    _check_consent(values | {"adapter_base": None}, overrides)  # given when the run began
    current = {key: cfg[key] for key in ("retry_failed", "report", "strict")}
    current["resume"] = resumed_path(cfg.resume)
    # keys that did not exist when the run was saved
    current |= {"adapter_base": values.get("adapter_base"), "host": values.get("host", False)}
    current["lockstep"] = {**plain(cfg.lockstep), **values["lockstep"]}
    current |= {name: values.get(name, usual) for name, usual in SWITCHES.items()}
    current["sweep_name"] = values.get("sweep_name")
    current["early_stopping"] = values.get("early_stopping")
    current["parallel"] = values.get("parallel")
    current["keep"] = "best" if values["train"].get(LOAD_BEST) else "last"
    if current["keep"] == "best" and not saves_each_best(values["train"]):
        text = "best, but the run saves no checkpoint of each evaluation, so the best may be lost"
        raise ConfigError([("keep", f"{text}; start a new run")])
    return values | current | {"trusted_targets": list(cfg.trusted_targets)}


def _is_missing(values: Any) -> bool:
    """Return whether a value is omegaconf's mark for one that is required."""
    if isinstance(values, dict | list):
        return any(map(_is_missing, values.values() if isinstance(values, dict) else values))
    return isinstance(values, str) and values == MISSING


def fingerprint(cfg: DictConfig) -> str:
    """Return the SHA-256 of what a config computes: equal configs give equal adapters."""
    return fingerprints(cfg)[0]


def fingerprints(cfg: DictConfig, limits: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Return a config's fingerprint, and the one that earlier versions wrote for it.

    Args:
        cfg: the run's config.
        limits: hashed instead of the values of `train`: `max_steps` and `num_train_epochs` of a
            run that was trained longer.

    Returns:
        The fingerprint, for which 0 and 0.0 are equal; then the one for which they differed.
    """
    values = {key: value for key, value in plain(cfg).items() if key not in NOT_COMPUTED}
    values["lockstep_mode"] = cfg.lockstep.mode
    if not has_patience(values):  # other rules only stop losers; earlier versions had none
        values.pop("early_stopping", None)
    for name, usual in SWITCHES.items():  # computes what a run of an earlier version does
        if values.get(name, usual) == usual:
            values.pop(name, None)
    if process_count(values) == 1:  # computes what a run without processes does
        values.pop("parallel", None)
    else:
        values["parallel"].pop("nodes", None)  # the same processes, elsewhere
    values["data"].pop("num_proc", None)  # the tokens do not depend on it
    values["train"] |= limits or {}
    # as earlier versions wrote it, which had no such keys, and sdpa for what auto is
    model, quant = values["model"], values.get("quant")
    if not model.get("add_tokens"):
        model.pop("add_tokens", None)
    if model.get("attn_implementation") == "auto":
        model["attn_implementation"] = "sdpa"
    if isinstance(quant, dict):
        if not quant.get("skip_modules"):
            quant.pop("skip_modules", None)
        if quant.get("experts"):  # the default; what it changes is in the record's quantised_share
            quant.pop("experts")
    if not evaluations_act(values):
        reports = re.compile(r"(logging|save|eval)_")  # they do not affect the result
        values["train"] = {k: v for k, v in values["train"].items() if not reports.match(k)}
    values = with_oldest_names(values)
    versions = _with_whole_numbers(values), values
    texts = (json.dumps(version, sort_keys=True) for version in versions)
    current, earlier = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return current, earlier


def _with_whole_numbers(values: Any) -> Any:
    """Return nested dicts and lists in which floats that are whole numbers become ints."""
    if isinstance(values, Mapping):
        return {key: _with_whole_numbers(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_whole_numbers(value) for value in values]
    return int(values) if isinstance(values, float) and values.is_integer() else values
