"""What a search prints: its plan, each batch, and at the end its best trials and commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lora_exp.record.console import console, facts, short
from lora_exp.search.cells import Cells
from lora_exp.search.settings import Settings
from lora_exp.search.trial import Trial, front

SHOWN = 8  # trials of the first batch


def print_plan(cells: Cells, total: int, first: Sequence[Trial], train: Mapping[str, Any]) -> None:
    """Print what a search would do, without doing it.

    Args:
        cells: those of the search.
        total: how many trials there would be.
        first: the first batch.
        train: the section `train` of its first trial; empty: the task has none.
    """
    settings = cells.settings
    lines = {d.key: str(d) for d in cells.presence.space.dimensions}
    lines["trials"] = f"{total} by {settings.sampler}, {settings.batch} at a time"
    lines["trains"] = _most_steps(total, train)
    lines["objectives"] = ", ".join(f"{k} ({goal})" for k, goal in settings.objectives.items())
    lines["limits"] = _left_out(cells) or str(settings.limits)
    for number, trial in enumerate(first[:SHOWN]):
        size = cells.size(trial.values)
        lines[f"trial {number}"] = " ".join(trial.overrides) + (f": {size}" if size else "")
    if len(first) > SHOWN:
        lines["..."] = f"{len(first) - SHOWN} more in the first batch"
    shown = {key: text for key, text in lines.items() if text}
    console.print(facts("search, dry run: nothing is trained", shown))


def _left_out(cells: Cells) -> str:
    """Return how many cells the limits leave out; empty: it is not known."""
    counted = cells.left_out()
    if counted is None:
        return ""
    return f"{cells.settings.limits}: {counted[0]} of {counted[1]} cells are left out"


def print_start(total: int, cells: Cells) -> None:
    """Print how many trials there will be, if limits leave out cells of a grid."""
    if cells.settings.sampler == "grid" and (text := _left_out(cells)):
        console.print(Text(f"search: {total} trials; {text}"))


def _most_steps(total: int, train: Mapping[str, Any]) -> str:
    steps, epochs = train.get("max_steps", -1), train.get("num_train_epochs")
    if steps and steps > 0:
        return f"at most {total} x {steps} = {total * steps} steps"
    return f"{total} jobs of {epochs} epochs" if epochs else f"{total} jobs"


def print_batch(
    numbers: Sequence[int], total: int, trials: Sequence[Trial], directions: Sequence[str]
) -> None:
    """Print which trials begin, and the best so far."""
    which = f"trials {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"trial {numbers[0]}"
    text = f"search: {which} of {total}"
    if leaders := front(trials, directions):
        if len(directions) > 1:
            text += f"; Pareto front so far: {', '.join(map(str, leaders))}"
        else:
            text += f"; best so far: trial {leaders[0]}, {short(trials[leaders[0]].objectives[0])}"
    console.print(Text(text))


def print_result(
    trials: Sequence[Trial], settings: Settings, objective: str, common: Sequence[str]
) -> None:
    """Print the best trial, or the Pareto front of several objectives, and commands.

    Args:
        trials: all of the search; one is complete.
        settings: those of the search.
        objective: name of the first objective, as jobs have recorded it.
        common: arguments of all trials.
    """
    leaders = front(trials, settings.directions)
    states = {state: sum(t.state == state for t in trials) for state in ("pruned", "failed")}
    counted = "".join(f", {count} {state}" for state, count in states.items() if count)
    if settings.objectives:
        names = [objective, *list(settings.objectives)[1:]]
        head = f"search: Pareto front, {len(leaders)} of {len(trials)} trials{counted}"
        console.print(Text(head, style="bold"))
        console.print(_front(names, trials, leaders))
        console.print("each alone:", style="dim")
    else:
        leaders = leaders[:1]
        leader = trials[leaders[0]]
        value = short(leader.objectives[0])
        lines = {
            "best": f"trial {leaders[0]} of {len(trials)}{counted}; {objective} {value}",
            "values": " ".join(leader.overrides),
        }
        console.print(facts("search", lines))
        console.print("the best trial alone:", style="dim")
    for number in leaders:
        command = shlex.join(["lora-exp", "run", *common, *trials[number].overrides])
        console.print(Text(command), soft_wrap=True)  # one line, to be copied


def _front(names: Sequence[str], trials: Sequence[Trial], leaders: Sequence[int]) -> Table:
    """Return a table of trials with their values of all objectives, and what varies."""
    table = Table()
    for column in ("trial", *names, "values"):
        table.add_column(column, overflow="fold")
    for number in leaders:
        trial = trials[number]
        numbers = map(short, trial.objectives)
        table.add_row(str(number), *numbers, Text(" ".join(trial.overrides)))
    return table
