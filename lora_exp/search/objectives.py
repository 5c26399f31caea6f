"""Several objectives: which there may be, and a trial's values of them.

An objective is a function of bits: times and measured memory differ from run to run, so a search
by them would not repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lora_exp.config.keep import goal_of
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.search.limits import BYTES, PARAMETERS, Size

KEY = "hydra.sweeper.objectives"
DIRECTIONS = ("minimize", "maximize")
SIZES = (PARAMETERS, BYTES)  # known before training
MEASURED_TIME = re.compile(r"(.*/)?(\w*seconds|\w+_per_s(econd)?|\w*runtime|peak_bytes)$")
Fault = tuple[str, str]
SizeOf = Callable[[Mapping[str, str]], Size | None]  # of a cell; None: its job will be refused


def objective_faults(
    objectives: Mapping[str, str], objective: str | None, goal: str | None
) -> Iterator[Fault]:
    """Yield what is wrong with `hydra.sweeper.objectives`.

    Args:
        objectives: their goals.
        objective: that of the config.
        goal: that of the config.
    """
    if len(objectives) == 1:
        yield KEY, "are two or more; a single one is that of the config: objective=... goal=..."
    elif (first := next(iter(objectives.items()))) != (objective, goal):
        text = f"begin with {first[0]} ({first[1]}), but jobs are judged by {objective} ({goal})"
        yield KEY, f"{text}; give that one first, or objective={first[0]} goal={first[1]}"
    for number, (name, direction) in enumerate(objectives.items()):
        if direction not in DIRECTIONS:
            near = did_you_mean(direction, DIRECTIONS)
            yield KEY, f"{name}: {direction!r} is none of {', '.join(DIRECTIONS)}{near}"
        elif number and goal_of(name) not in (None, direction):
            yield KEY, f"{name}: {direction} would look for the worst; give {goal_of(name)}"
        if MEASURED_TIME.match(name):
            text = "differs from run to run, so the search would not repeat"
            yield KEY, f"{name} {text}; {BYTES} is the memory as estimated"
        elif name.startswith("train/"):
            text = "has a last value that depends on an interruption"
            yield KEY, f"{name} {text}; give one of held-out rows, like eval/loss"


def check_measured(objectives: Iterable[str], measured: Iterable[str]) -> None:
    """Refuse objectives that are neither a size nor measured by jobs.

    Args:
        objectives: their names.
        measured: the names of a job's metrics.

    Raises:
        ConfigError: one is not (all are listed).
    """
    known = [name for name in measured if name.startswith("eval/")] + list(SIZES)
    faults = [
        (KEY, f"{name} is not measured{did_you_mean(name, known)}: {', '.join(known)}")
        for name in objectives
        if name not in known
    ]
    if faults:
        raise ConfigError(faults)


def of_all_tasks(name: str) -> str:
    """Return the metric of all rows if a name is that of one task's: tasks are in the rows."""
    return re.sub(r"^(eval/exact_match)_\w+$", r"\1", name)


def other_values(
    objectives: Iterable[str], record: Mapping[str, Any], size: Callable[[], Size | None]
) -> dict[str, Any]:
    """Return a job's values of all objectives but the first; None: it has none.

    Args:
        objectives: their names.
        record: the job's run.json.
        size: returns what the job needs.
    """
    values = dict(record.get("metrics") or {})
    values[PARAMETERS] = (record.get("counts") or {}).get("trainable_parameters")
    names = list(objectives)[1:]
    if BYTES in names:
        needed = size()
        values[BYTES] = needed and needed.bytes
    return {name: values.get(name) for name in names}
