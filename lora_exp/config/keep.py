"""`keep: last` or `best`, the weights that a run saves, as transformers' arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_exp.config.overrides import split_override
from lora_exp.errors import ConfigError

KEEP_VALUES = ("last", "best")
LOAD_BEST = "load_best_model_at_end"


def apply_keep(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a composed config in which `keep` and the trainer's arguments agree.

    With `best`, a checkpoint is saved at each evaluation, unless the command line sets when.

    Raises:
        ConfigError: `keep` contradicts the trainer's arguments.
    """
    train, keep = values.get("train"), values.get("keep", "last")
    overridden = {split_override(override)[0] for override in overrides}
    if keep not in KEEP_VALUES:
        raise ConfigError([("keep", f"{keep!r} is none of {', '.join(KEEP_VALUES)}")])
    if not isinstance(train, dict):
        return values
    if keep == "last" and train.get(LOAD_BEST):
        if "keep" in overridden:
            raise ConfigError([("keep", f"last, but train.{LOAD_BEST}=true is keep=best")])
        return values | {"keep": "best"}
    if keep == "last":
        return values
    if train.get(LOAD_BEST) is False:
        raise ConfigError([("keep", f"best, but train.{LOAD_BEST}=false is keep=last")])
    if train.get("eval_strategy") == "no":
        raise ConfigError([("keep", "best needs evaluations; give train.eval_strategy=epoch")])
    counterparts = {"save_strategy": "eval_strategy", "save_steps": "eval_steps"}
    save_settings = {
        save_key: train[eval_key]
        for save_key, eval_key in counterparts.items()
        if train.get(eval_key) is not None
    }
    if overridden & {f"train.{key}" for key in counterparts}:
        save_settings = {}
    updated = train | save_settings | {LOAD_BEST: True}
    if not _saves_when_evaluated(updated):
        text = "best takes one of the evaluated checkpoints; leave train.save_strategy and"
        raise ConfigError([("keep", f"{text} train.save_steps out, or let them match eval_*")])
    return values | {"train": updated}


def _saves_when_evaluated(train: dict[str, Any]) -> bool:
    """Return whether every checkpoint is saved at an evaluation."""
    if train.get("save_strategy") == "best":
        return True
    if train.get("save_strategy") != train.get("eval_strategy"):
        return False
    if train.get("save_strategy") != "steps":
        return True
    save_steps = train.get("save_steps")
    eval_steps = train.get("eval_steps") or train["logging_steps"]
    are_counts = isinstance(save_steps, int) and isinstance(eval_steps, int) and eval_steps > 0
    return are_counts and save_steps % eval_steps == 0
