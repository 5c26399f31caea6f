"""`lora-exp`: the tools for saved runs, and `lora-exp run`, which is the same as run.py.

options   options that several commands share
train     run, reproduce, estimate
look      runs, compare, inspect, check, ...
make      save, merge, push, sync
use       chat, serve, generate
__main__  python -m lora_exp.cli

Torch is imported by the command that needs it, never for help or a mistake in the command line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from lora_exp.cli import look, make, train, use
from lora_exp.errors import LoraExpError
from lora_exp.files.whole import STAGE, refusal

app = typer.Typer(
    name="lora-exp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        print(version("lora-exp"))
        raise typer.Exit


@app.callback()
def lora_exp(
    _: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Train adapters, then inspect, merge, prove, chat with, serve and publish them."""


EXIT_INTERRUPTED = 130  # typer's, of Ctrl-C
LOOK, MAKE, USE, TRAIN = "Look", "Make", "Use", "Train"  # panels of the help
COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    (LOOK, look.runs),
    (LOOK, look.inspect),
    (LOOK, look.compare),
    (MAKE, make.save),
    (MAKE, make.merge),
    (LOOK, look.check),
    (USE, use.chat),
    (USE, use.serve),
    (USE, use.generate),
    (LOOK, look.evaluate),
    (MAKE, make.push),
    (MAKE, make.sync),
    (LOOK, look.doctor),
    (LOOK, look.models),
    (TRAIN, train.reproduce),
    (TRAIN, train.estimate),
)

app.command(
    rich_help_panel=TRAIN,
    context_settings={  # options, --help too, are passed on to Hydra
        "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
    },
)(train.run)  # fmt: skip
for panel, command in COMMANDS:
    app.command(rich_help_panel=panel)(command)


def main() -> None:
    """Run the command line; errors that the user can fix are printed without a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # else each failed request to a Hub is logged
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if "=" in "".join(sys.argv[1:2]):  # overrides without `run`
        print(f"lora-exp run {' '.join(sys.argv[1:])} trains; see lora-exp --help", file=sys.stderr)
        sys.exit(2)
    try:
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(code)
    except TyperException as error:
        print(_usage(error), file=sys.stderr)
        sys.exit(2)
    except LoraExpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        refused = refusal(error, Path.cwd())
        if refused is None and error.filename is None:
            raise
        path = str(error.filename).replace(STAGE, "")
        print(refused or f"{path}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported yet
            raise
        print("out of memory: take --quant nf4, smaller batches or shorter texts", file=sys.stderr)
        sys.exit(1)


def _usage(error: Any) -> str:
    """Return a mistake in the command line in one line; without a command, the help."""
    message = error.format_message().replace("Value error, ", "")
    command = error.ctx.command_path if error.ctx else "lora-exp"
    return message if "\n" in message else f"{command}: {message} See {command} --help"
