"""`lora-exp`: the tools for what was trained; a run is started by `lora-exp run` or run.py.

Torch is imported by the command that needs it, never for help or a mistake in the command line.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from lora_exp.errors import LoraExpError
from lora_exp.files.strict import dumps
from lora_exp.files.whole import STAGE, refusal

app = typer.Typer(
    name="lora-exp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
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


class Engine(StrEnum):
    """What serves."""

    transformers = "transformers"
    vllm = "vllm"


Path_ = Annotated[str, typer.Argument(metavar="PATH", help="an adapter, run, checkpoint or model")]
Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="adapters or runs of one base; NAME=PATH names one"),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="where the base lies, if not where the adapter says: folder, hub id, option; "
        "NAME=PLACE if its name there is another"
    ),
]
QuantOption = Annotated[
    Quant | None, typer.Option(help="how to hold the base; as its run did, unless given")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="the folder to make")]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def _completed(context: typer.Context, incomplete: str) -> list[str]:
    """Complete groups, options and keys; shells part words at `=`, so the key may stand before."""
    from lora_exp.config.completion import completions

    words = (context.params.get("overrides") or []) if context.params else []
    return completions(incomplete, list(words))


@app.command(
    rich_help_panel=TRAIN,
    context_settings={
        "allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": [],
    },
)  # fmt: skip
def run(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", autocompletion=_completed)
    ] = None,
) -> None:
    """Train a run or, with -m, a sweep: `lora-exp run peft.r=8`; the same as python run.py."""
    from lora_exp.__main__ import main as train

    sys.argv = ["lora-exp run", *(overrides or []), *context.args]
    sys.path.insert(0, str(Path.cwd()))  # rewards of one's own, as python -m finds them
    train()


@app.command(rich_help_panel=LOOK)
def inspect(path: Path_, as_json: Json = False) -> None:
    """Show what an adapter, run, sweep or model is, and which of its layers changed."""
    _look_for(path)
    from lora_exp.after.inspection import inspect as look
    from lora_exp.after.pages import inspection

    found = look(path)
    _print(found, inspection, as_json)
    if not found.get("finite", True):
        raise typer.Exit(1)


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
    _look_for(path)
    from lora_exp.after.saving import save as take

    print(take(path, out, as_lora, rank, base, force))


@app.command(rich_help_panel=MAKE)
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="adapters or runs of one base")
    ],
    out: Out,
    base: Base = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of the merged weights")] = None,
    into: Annotated[
        Into, typer.Option(help="the unquantised base, or what a QLoRA run saw of it")
    ] = Into.original,
    method: Annotated[
        str, typer.Option(help="how several become one: cat, svd, linear, ties, dare_linear, ...")
    ] = "cat",
    weights: Annotated[
        str | None, typer.Option(help="of each of several adapters: 0.7,0.3", metavar="W,W...")
    ] = None,
    density: Annotated[float, typer.Option(help="the share that ties and dare_linear keep")] = 0.5,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file")] = "5GB",
    force: Force = False,
) -> None:
    """Merge adapters into their base: a whole model for engines that know no adapters."""
    shares = _numbers("--weights", weights) if weights else None
    _look_for(*adapters)
    from lora_exp.after.merging import merge as make

    made = make(
        adapters, out, base=base, dtype=dtype and dtype.value, into=into.value, method=method,
        weights=shares, density=density, max_shard_size=max_shard_size, force=force,
    )  # fmt: skip
    print(made)
    told = ["lora-exp", "check", str(made)]
    told += [word for adapter in adapters for word in ("--adapter", str(adapter))]
    print(f"prove it: {shlex.join([*told, *(['--base', base] if base else [])])}")


@app.command(rich_help_panel=LOOK)
def check(
    merged: Annotated[str, typer.Argument(metavar="MODEL", help="a merged or whole model")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="the adapter, or its run, that it was merged from; again for each of them"
        ),
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
    if not adapter and (prompts or base or quant):
        raise typer.BadParameter("--prompts, --base and --quant need it", param_hint="--adapter")
    _look_for(merged, *(adapter or []))
    from lora_exp.after import pages, proof, soundness

    if not adapter:
        found = soundness.examine(merged)
        _print(found, pages.examination, as_json)
        holds = not any(found.values())
    else:
        shown = proof.prove(merged, adapter, base, quant and quant.value, prompts, max_new_tokens)
        _print(shown.values(), pages.proof, as_json)
        holds = shown.holds
    if not holds:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def chat(
    paths: Paths,
    base: Base = None,
    quant: QuantOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter first")] = False,
    system: Annotated[str | None, typer.Option(help="the system prompt")] = None,
) -> None:
    """Talk to what was trained; several adapters answer beside their base. Pipes work too."""
    _look_for(*paths)
    from lora_exp.after.chat import Chat, open_chat

    if not Chat(open_chat(paths, base, quant and quant.value, merge, system)).run():
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def serve(
    paths: Paths,
    base: Base = None,
    quant: QuantOption = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 answers the whole network, which needs no key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free", min=0, max=65535)] = 8000,
    engine: Annotated[
        Engine, typer.Option(help="vllm, where it is installed, is faster on a GPU")
    ] = Engine.transformers,
) -> None:
    """Serve what was trained as OpenAI's interface does: each adapter is a model, and the base."""
    _look_for(*paths)
    from lora_exp.after import pages, serving

    def ready(url: str, chats: dict[str, bool]) -> None:
        print(pages.serving(url, chats), flush=True)

    serving.serve(paths, ready, base, quant and quant.value, host, port, engine.value)


@app.command(rich_help_panel=USE)
def generate(
    path: Path_,
    prompts: Annotated[str, typer.Option(help="JSON lines (or a glob) that ask something")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the JSON lines file to make")],
    base: Base = None,
    quant: QuantOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time", min=0.0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="the share of the likelihood to draw from", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    batch_size: Annotated[int, typer.Option(help="prompts at a time", min=1)] = 16,
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="a prompt that is text is a user's turn")
    ] = False,
    force: Force = False,
) -> None:
    """Answer a file of prompts; the same command goes on where an interrupted one stopped."""
    _look_for(path)
    from lora_exp.after.completion import generate as answer

    made = answer(
        path, prompts, out, base=base, quant=quant and quant.value, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed, batch_size=batch_size, as_chat=as_chat,
        force=force,
    )  # fmt: skip
    print(made)


@app.command(rich_help_panel=LOOK)
def evaluate(
    path: Path_,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines (or a glob) with known answers; the run's held-out rows, unless given"
        ),
    ] = None,
    base: Base = None,
    quant: QuantOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each greedy answer", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="rows at a time", min=1)] = 16,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="a JSON file to write to, too")
    ] = None,
    force: Force = False,
) -> None:
    """Measure loss, exact match, ROUGE-L and BLEU, with the adapter and without it."""
    _look_for(path)
    from lora_exp.after import evaluation, pages

    found = evaluation.evaluate(
        path, data, base, quant and quant.value, max_new_tokens, batch_size, out, force
    )
    _print(found, pages.evaluation, as_json)


@app.command(rich_help_panel=MAKE)
def push(
    path: Path_,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="of the Hub")],
    public: Annotated[bool, typer.Option("--public", help="for everybody to see")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="write what would be sent, and send nothing")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="the dry run's folder; push-dry-run/NAME unless given"),
    ] = None,
    revision: Annotated[str, typer.Option(help="the branch, made if it is not there")] = "main",
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    base_id: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="what others call the base, if it lies here"),
    ] = None,
    force: Force = False,
) -> None:
    """Send an adapter or model to the Hugging Face Hub with its card: private unless --public."""
    if out is not None and not dry:
        raise typer.BadParameter("is for --dry-run", param_hint="--out")
    _look_for(path)
    from lora_exp.after import pages, publication
    from lora_exp.record.console import console

    if dry:
        made = publication.dry_run(path, repo_id, out, base_id, force)
        files = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
        seen = "public" if public else "private"
        told = f"{made}\nnothing was sent; without --dry-run: to {repo_id}, {revision}, {seen}"
    else:
        sent = publication.push(path, repo_id, public, revision, message, base_id)
        files, seen = sent["files"], "private" if sent["private"] else "public"
        told = f"{sent['url']}\n{seen}, commit {sent['commit']}"
    console.print(pages.parcel(files, told))


@app.command(rich_help_panel=LOOK)
def doctor(as_json: Json = False) -> None:
    """See whether this machine can train, and what to do where it cannot."""
    from dataclasses import asdict

    from lora_exp.after import pages
    from lora_exp.after.doctor import examine

    found = [asdict(finding) for finding in examine()]
    _print(found, pages.doctor, as_json)
    if any(finding["state"] == "wrong" for finding in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN)
def estimate(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDES]...", help="as run.py takes them")
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="a folder with your own options")] = None,
    as_json: Json = False,
) -> None:
    """Tell what a run would train and the memory it would take; only its config is downloaded.

    Not counted: PPO's value, the reference that DPO of every weight keeps, and what the process
    itself takes.
    """
    from lora_exp.after import pages
    from lora_exp.after.estimate import estimate as count
    from lora_exp.config.composition import compose

    _print(count(compose(*overrides or (), config_dir=config_dir)), pages.estimate, as_json)


def _look_for(*paths: str | Path) -> None:
    """Tell that there is nothing at a path before torch is imported, which takes seconds."""
    from lora_exp.after.saved import find_all

    for path in map(str, paths):
        if not Path(path).expanduser().exists():  # or it is NAME=PATH, or in a package
            find_all([path])


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
        print(dumps(found, indent=1, default=str))
        return
    from lora_exp.record.console import console

    console.print(page(found))


def main() -> None:
    """Run the command line; errors that the user can mend are one message without a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or it tells each try of a Hub out of reach
    if "=" in "".join(sys.argv[1:2]):
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
    except BrokenPipeError:  # who read us went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        told = refusal(error, Path.cwd())
        if told is None and error.filename is None:
            raise
        place = str(error.filename).replace(STAGE, "")
        print(told or f"{place}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported yet
            raise
        print("out of memory: take --quant nf4, smaller batches or shorter texts", file=sys.stderr)
        sys.exit(1)


def _usage(error: Any) -> str:
    """Return a mistake in the command line, in a line; or help, where there is no command."""
    told = error.format_message().replace("Value error, ", "")
    command = error.ctx.command_path if error.ctx else "lora-exp"
    return told if "\n" in told else f"{command}: {told} See {command} --help"


if __name__ == "__main__":
    main()
