"""`keep: last` or `best`: which weights of a run are saved, in transformers' own arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_exp.config.overrides import parted
from lora_exp.errors import ConfigError

KEPT = ("last", "best")
LOADED = "load_best_model_at_end"


def kept(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a composed config in which `keep` and the trainer's arguments agree.

    With `best` checkpoints are saved where rows are evaluated, unless the command line says when.

    Raises:
        ConfigError: they contradict each other.
    """
    train, keep = values.get("train"), values.get("keep", "last")
    given = {parted(override)[0] for override in overrides}
    if keep not in KEPT:
        raise ConfigError([("keep", f"{keep!r} is none of {', '.join(KEPT)}")])
    if not isinstance(train, dict):
        return values
    if keep == "last" and train.get(LOADED):
        if "keep" in given:
            raise ConfigError([("keep", f"last, but train.{LOADED}=true is keep=best")])
        return values | {"keep": "best"}
    if keep == "last":
        return values
    if train.get(LOADED) is False:
        raise ConfigError([("keep", f"best, but train.{LOADED}=false is keep=last")])
    if train.get("eval_strategy") == "no":
        raise ConfigError([("keep", "best needs evaluations; give train.eval_strategy=epoch")])
    followed = {"save_strategy": "eval_strategy", "save_steps": "eval_steps"}
    when = {own: train[its] for own, its in followed.items() if train.get(its) is not None}
    if given & {f"train.{key}" for key in followed}:
        when = {}
    made = train | when | {LOADED: True}
    if not _together(made):
        text = "best takes one of the evaluated checkpoints; leave train.save_strategy and"
        raise ConfigError([("keep", f"{text} train.save_steps out, or let them match eval_*")])
    return values | {"train": made}


def _together(train: dict[str, Any]) -> bool:
    """Say whether every checkpoint is saved when rows are evaluated."""
    if train.get("save_strategy") == "best":
        return True
    if train.get("save_strategy") != train.get("eval_strategy"):
        return False
    if train.get("save_strategy") != "steps":
        return True
    saved, evaluated = train.get("save_steps"), train.get("eval_steps") or train["logging_steps"]
    whole = isinstance(saved, int) and isinstance(evaluated, int) and evaluated > 0
    return whole and saved % evaluated == 0
