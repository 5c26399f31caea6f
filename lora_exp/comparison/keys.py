"""The keys of runs' configs that differ, and which of them a table shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_exp.config.settled import GROUPS, NOT_COMPUTED, SWITCHES
from lora_exp.runs.run import SavedRun

ABSENT = object()
# what does not change the result, beside the seed, which is what groups are over
NOT_COMPARED = {"seed", "early_stopping", *NOT_COMPUTED} - {"lockstep", "keep"}
# which earlier versions did not write
NOT_WRITTEN = (("parallel.processes", 1), *SWITCHES.items())
PATIENCE = "early_stopping.patience"
LOCKSTEP = re.compile(r"lockstep\.(?!mode$)")
REPORTS_OR_PROCESSES = re.compile(r"train\.(logging|save)_|data\.num_proc$")
OF_EVALUATION = re.compile(r"train\.eval_(?!accumulation)")
Configs = Sequence[Mapping[str, Any]]


def compared(run: SavedRun) -> dict[str, Any]:
    """Return the keys of a run's config that make it another experiment."""
    config = run.config()
    acts = PATIENCE in config or bool(config.get("train.load_best_model_at_end"))
    return {
        key: value
        for key, value in config.items()
        if (key.partition(".")[0] not in NOT_COMPARED or key == PATIENCE)
        and not (LOCKSTEP.match(key) or REPORTS_OR_PROCESSES.match(key))
        and (acts or not OF_EVALUATION.match(key))
        and (key, value) not in NOT_WRITTEN
    }


def canonical(value: Any) -> str:
    """Return a text that equal values share; 1 and 1.0 are equal."""
    if value is ABSENT:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def differing(configs: Configs) -> list[str]:
    """Return the keys whose value is not the same in all configs; a missing key differs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({canonical(c.get(key, ABSENT)) for c in configs}) > 1]


def columns(runs: Sequence[SavedRun], differ: Sequence[str]) -> tuple[list[str], list[str]]:
    """Choose the keys that a table shows.

    An option that was chosen stands for all keys of its group, then come keys that a command line
    named, then what those do not determine.

    Args:
        runs: those compared.
        differ: the keys of their configs that differ.

    Returns:
        The keys shown, a group's name for its option; and those left out since they follow the
        shown ones, like an alpha that is twice the rank.
    """
    choices = [{g: run.config().get(f"choices.{g}") for g in GROUPS} for run in runs]
    varied = set(differing(choices))
    shown = [g for g in GROUPS if g in varied and any(_is_of(key, g) for key in differ)]
    named = dict.fromkeys(key for run in runs for key in run.overrides)
    shown += [key for key in named if key in differ and key not in shown]
    implied = []
    for key in (key for key in differ if key not in shown):
        if not determines(runs, shown, key):
            shown.append(key)
        elif not any(_is_of(key, g) and determines(runs, [g], key) for g in shown if g in GROUPS):
            implied.append(key)
    return shown, implied


def value_of(run: SavedRun, key: str) -> Any:
    """Return a run's value of a key, or of a group the chosen option; ABSENT: it has none."""
    config = run.config()
    chosen = config.get(f"choices.{key}", ABSENT) if key in GROUPS else ABSENT
    return config.get(key, ABSENT) if chosen is ABSENT else chosen


def determines(runs: Iterable[SavedRun], keys: Sequence[str], other: str) -> bool:
    """Return whether runs that agree in some keys agree in another."""
    known: dict[tuple[str, ...], str] = {}
    for run in runs:
        values = tuple(canonical(value_of(run, key)) for key in keys)
        value = canonical(run.config().get(other, ABSENT))
        if known.setdefault(values, value) != value:
            return False
    return True


def text_of(values: Mapping[str, Any], key: str) -> str:
    """Return a value for a table; empty: a config has no such key."""
    if key not in values:
        return ""
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _is_of(key: str, group: str) -> bool:
    """Return whether a group's option sets a key."""
    of_targets = group == "targets" and key == "peft.target_modules"
    return of_targets or key.partition(".")[0] == group
