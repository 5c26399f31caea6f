"""`keep: last` or `best`, the weights that a run saves, as transformers' arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_exp.config.arguments import FOLLOWS_EVALUATIONS
from lora_exp.config.overrides import split_override
from lora_exp.errors import ConfigError

HIGHER_IS_BETTER = re.compile(
    r"exact_match|accurac|(mean_token|preference)_accuracy|margin$|reward$"
    r"|rewards/(margins|accurac|\w+/mean)"
)
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
    if keep == "last" and not train.get(LOAD_BEST):
        return values
    if keep == "last" and "keep" in overridden:
        raise ConfigError([("keep", f"last, but train.{LOAD_BEST}=true is keep=best")])
    if train.get(LOAD_BEST) is False:
        raise ConfigError([("keep", f"best, but train.{LOAD_BEST}=false is keep=last")])
    if train.get("eval_strategy") == "no":
        raise ConfigError([("keep", "best needs evaluations; give train.eval_strategy=epoch")])
    train = train | {LOAD_BEST: True}
    if not saves_each_best(train) and not overridden & {"train.save_strategy", "train.save_steps"}:
        train |= {"save_strategy": train.get("eval_strategy"), "save_steps": _eval_steps(train)}
    if not saves_each_best(train):
        text = "best needs a checkpoint of each evaluation; leave train.save_strategy and"
        raise ConfigError([("keep", f"{text} train.save_steps out, or let them equal eval_*")])
    return values | {"keep": "best", "train": train}


def goal_of(objective: str) -> str | None:
    """Return the goal of a metric, such as eval/loss; None: either may be wanted."""
    name = objective.partition("/")[2]
    if name.endswith(("loss", "kl")):
        return "minimize"
    return "maximize" if HIGHER_IS_BETTER.match(name) else None


def saves_each_best(train: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is saved whenever an evaluation is the best so far."""
    saving, evaluation = train.get("save_strategy"), train.get("eval_strategy", "no")
    if evaluation == "no" or saving not in (evaluation, "best"):
        return False
    return saving != "steps" or bool(train.get("save_steps") == _eval_steps(train))


def _eval_steps(train: Mapping[str, Any]) -> Any:
    """Return the steps, or the share of all steps, between two evaluations."""
    return train.get("eval_steps") or train.get("logging_steps")  # as transformers does


def evaluations_act(values: Mapping[str, Any]) -> bool:
    """Return whether evaluations affect a run's result.

    They do if the best is loaded, if they set the rate, or if the run ends by its patience.

    Args:
        values: the run's config.
    """
    train = values["train"]
    follows = train.get("lr_scheduler_type") in FOLLOWS_EVALUATIONS
    return bool(train.get(LOAD_BEST)) or follows or has_patience(values)


def has_patience(values: Mapping[str, Any]) -> bool:
    """Return whether a run's `early_stopping` changes what a finished run saves."""
    return "patience" in (values.get("early_stopping") or {})
