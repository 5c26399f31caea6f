"""`lora-exp`: the tools for what was trained; a run is started by `lora-exp run` or run.py.

Torch is imported by the command that needs it, never for help or a mistake in the command line.
"""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from hydra.errors import HydraException

from lora_exp.disk import refusal
from lora_exp.errors import LoraExpError

app = typer.Typer(
    name="lora-exp",
    help="Train adapters, then inspect, merge, prove, chat with, serve and publish them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
LOOK, MAKE, USE, TRAIN = "Look", "Make", "Use", "Train"  # help's panels


class Quant(StrEnum):
    """How a base is held."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


class Dtype(StrEnum):
    """Of saved weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Into(StrEnum):
    """What a merge adds the adapter to."""

    original = "original"
    dequantised = "dequantised"


Path_ = Annotated[Path, typer.Argument(metavar="PATH", help="an adapter, run, checkpoint or model")]
Base = Annotated[
    str | None,
    typer.Option(help="where the base lies, if not where the adapter says: folder, hub id, option"),
]
QuantOption = Annotated[
    Quant | None, typer.Option(help="how to hold the base; as its run did, unless given")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="the folder to make")]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command(
    rich_help_panel=TRAIN,
    context_settings={
        "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
    },
)  # fmt: skip
def run(context: typer.Context) -> None:
    """Train a run or, with -m, a sweep: `lora-exp run peft.r=8`; the same as python run.py."""
    from lora_exp.__main__ import main as train

    sys.argv = ["lora-exp run", *context.args]
    train()


@app.command(rich_help_panel=LOOK)
def inspect(path: Path_, as_json: Json = False) -> None:
    """Show what an adapter, run, sweep or model is, and which of its layers changed."""
    from lora_exp.after.inspection import inspect as look
    from lora_exp.after.pages import inspection

    found = look(path)
    _print(found, inspection, as_json)


@app.command(rich_help_panel=MAKE)
def save(
    path: Path_,
    out: Out,
    as_lora: Annotated[bool, typer.Option(help="turn LoHa, LoKr, ... into LoRA")] = False,
    rank: Annotated[
        float, typer.Option(help="of that LoRA; below 1: the share of the update's energy kept")
    ] = 0.999,
    base: Base = None,
    force: Force = False,
) -> None:
    """Take an adapter out of a run or checkpoint, with tokenizer, model card and record."""
    from lora_exp.after.saving import save as take

    print(take(path, out, as_lora, rank, base, force))


@app.command(rich_help_panel=MAKE)
def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="adapters or runs of one base")
    ],
    out: Out,
    base: Base = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of the merged weights")] = None,
    into: Annotated[
        Into, typer.Option(help="the unquantised base, or what a QLoRA run saw of it")
    ] = Into.original,
    method: Annotated[
        str, typer.Option(help="how several become one: linear, cat, svd, ties, dare_ties, ...")
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(help="of each of several adapters: 0.7,0.3", metavar="W,W...")
    ] = None,
    density: Annotated[float, typer.Option(help="the share that ties and dare keep")] = 0.5,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file")] = "5GB",
    force: Force = False,
) -> None:
    """Merge adapters into their base: a whole model for engines that know no adapters."""
    from lora_exp.after.merging import merge as make

    shares = _numbers("--weights", weights) if weights else None
    made = make(
        adapters, out, base, dtype and dtype.value, into.value, method, shares, density,
        max_shard_size, force,
    )  # fmt: skip
    print(f"{made}\nprove it: lora-exp check {made} --adapter {adapters[0]}")


@app.command(rich_help_panel=LOOK)
def check(
    merged: Annotated[Path, typer.Argument(metavar="MODEL", help="a merged or whole model")],
    adapter: Annotated[
        Path | None, typer.Option(help="the adapter, or its run, that it was merged from")
    ] = None,
    base: Base = None,
    quant: QuantOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with a prompt each; the run's own unless given")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each greedy answer", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Prove that a merged model is its adapter on its base; without --adapter, that it works."""
    from lora_exp.after import pages, proof

    if adapter is None:
        found = proof.examine(merged)
        _print(found, pages.examination, as_json)
        holds = not any(found.values())
    else:
        shown = proof.prove(merged, adapter, base, quant and quant.value, prompts, max_new_tokens)
        _print(shown.values(), pages.proof, as_json)
        holds = shown.holds
    if not holds:
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: numbers with commas between", param_hint=option
        ) from None


def _print(found: Any, page: Any, as_json: bool) -> None:
    """Print JSON for programs, or a page for people."""
    if as_json:
        print(json.dumps(found, indent=1, default=str))
        return
    from lora_exp.console import console

    console.print(page(found))


def main() -> None:
    """Run the command line; errors that the user can mend are one message without a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if "=" in "".join(sys.argv[1:2]):
        print(f"lora-exp run {' '.join(sys.argv[1:])} trains; see lora-exp --help", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except (LoraExpError, HydraException) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        told = refusal(error, Path.cwd())
        if told is None:
            raise
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
