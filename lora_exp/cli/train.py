"""Commands of the help panel Train: run, reproduce, estimate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lora_exp import libraries
from lora_exp.cli.options import Json, print_result


def _completed(context: typer.Context, incomplete: str) -> list[str]:
    """Complete groups, options and keys; shells that split at `=` pass the key in `overrides`."""
    from lora_exp.config.completion import completions

    words = (context.params.get("overrides") or []) if context.params else []
    return completions(incomplete, list(words))


def run(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", autocompletion=_completed)
    ] = None,
) -> None:
    """Train a run or, with -m, a sweep: `lora-exp run peft.r=8`; the same as python run.py."""
    from lora_exp.__main__ import main as train

    sys.argv = ["lora-exp run", *(overrides or []), *context.args]
    sys.path.insert(0, str(Path.cwd()))  # for the user's rewards, as with python -m
    train()


def reproduce(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a run, also a sweep's job; or a whole sweep")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OVERRIDES]...", help="what a config file may not hold: trusted_targets=[...]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="the folder to train in; default: one that is deleted"),
    ] = None,
) -> None:
    """Train a run again from its record: are weights and metrics the same, byte for byte?

    A sweep is launched again as it was, in packs and with early stopping; a job of it trains alone.
    """
    from lora_exp.lockstep import devices
    from lora_exp.record.sweep import COMMAND

    if (Path(path) / COMMAND).is_file():
        _reproduce_sweep(Path(path), overrides or (), out)
        return
    devices.keep_one()
    sys.path.insert(0, str(Path.cwd()))  # for the user's rewards
    from lora_exp.after import reproduction, verdict
    from lora_exp.record.console import console

    recipe = reproduction.read_recipe(path, overrides or ())
    console.print(verdict.plan_page(recipe.run, recipe.record, recipe.reasons))
    result, folder = reproduction.reproduce(recipe, out)
    console.print(verdict.result_page(result, recipe.reasons, folder))
    if not result.same:
        raise typer.Exit(1)


def _reproduce_sweep(path: Path, overrides: Sequence[str], out: Path | None) -> None:
    from lora_exp.after import relaunch, verdict
    from lora_exp.record.console import console

    recipe = relaunch.read_sweep_recipe(path, overrides)
    console.print(verdict.sweep_page(recipe))
    results, folder = relaunch.relaunch(recipe, out)
    console.print(verdict.jobs_page(results, recipe.reasons, folder))
    if not all(result.same for result in results):
        raise typer.Exit(1)


def estimate(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="as run.py takes them")
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="a folder with your own options")] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run would train and its memory; only its config is downloaded.

    Not counted: PPO's critic, the reference model of DPO with peft=none, the process itself, and
    what fsdp gathers: with adapters its frozen layers count as if they were not shared out.
    """
    libraries.load(training=False, freeze=True)
    from lora_exp.after import pages
    from lora_exp.after.estimate import estimate as count
    from lora_exp.config.composition import compose

    print_result(count(compose(*overrides or (), config_dir=config_dir)), pages.estimate, as_json)
