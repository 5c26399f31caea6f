"""What a search prints: its plan, each batch, and at the end the best trial and its command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from lora_exp.record.console import console, facts, short
from lora_exp.search.settings import Settings
from lora_exp.search.space import Space
from lora_exp.search.trial import Trial, best

SHOWN = 8  # trials of the first batch


def print_plan(
    space: Space, settings: Settings, total: int, first: Sequence[Trial], train: Mapping[str, Any]
) -> None:
    """Print what a search would do, without doing it.

    Args:
        space: that of the search.
        settings: those of the search.
        total: how many trials there would be.
        first: the first batch.
        train: the section `train` of its first trial; empty: the task has none.
    """
    lines = {d.key: str(d) for d in space.dimensions}
    lines["trials"] = f"{total} by {settings.sampler}, {settings.batch} at a time"
    lines["trains"] = _most_steps(total, train)
    for number, trial in enumerate(first[:SHOWN]):
        lines[f"trial {number}"] = " ".join(trial.overrides)
    if len(first) > SHOWN:
        lines["..."] = f"{len(first) - SHOWN} more in the first batch"
    console.print(facts("search, dry run: nothing is trained", lines))


def _most_steps(total: int, train: Mapping[str, Any]) -> str:
    steps, epochs = train.get("max_steps", -1), train.get("num_train_epochs")
    if steps and steps > 0:
        return f"at most {total} x {steps} = {total * steps} steps"
    return f"{total} jobs of {epochs} epochs" if epochs else f"{total} jobs"


def print_batch(numbers: Sequence[int], total: int, trials: Sequence[Trial], way: str) -> None:
    """Print which trials begin, and the best so far."""
    which = f"trials {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"trial {numbers[0]}"
    text = f"search: {which} of {total}"
    leader = best(trials, way)
    if leader is not None:
        value = trials[leader].value
        assert value is not None
        text += f"; best so far: trial {leader}, {short(value)}"
    console.print(Text(text))


def print_result(trials: Sequence[Trial], way: str, objective: str, common: Sequence[str]) -> None:
    """Print the best trial, and the command that runs it alone."""
    leader = best(trials, way)
    assert leader is not None
    value = trials[leader].value
    assert value is not None
    states = {state: sum(t.state == state for t in trials) for state in ("pruned", "failed")}
    counted = "".join(f", {count} {state}" for state, count in states.items() if count)
    lines = {
        "best": f"trial {leader} of {len(trials)}{counted}; {objective} {short(value)}",
        "values": " ".join(trials[leader].overrides),
    }
    console.print(facts("search", lines))
    console.print("the best trial alone:", style="dim")
    command = shlex.join(["lora-exp", "run", *common, *trials[leader].overrides])
    console.print(Text(command), soft_wrap=True)  # one line, to be copied
