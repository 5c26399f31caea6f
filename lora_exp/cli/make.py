"""Commands of the help panel Make: save, merge, push, sync."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_exp import libraries
from lora_exp.cli.options import (
    Base,
    DeviceMap,
    DevicesOption,
    Force,
    Out,
    SavedPath,
    check_exists,
    on_devices,
)


class Dtype(StrEnum):
    """Types of saved weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Into(StrEnum):
    """Weights that a merge adds the adapter to."""

    original = "original"
    dequantised = "dequantised"


def save(
    path: SavedPath,
    out: Out,
    as_lora: Annotated[bool, typer.Option(help="turn LoHa, LoKr, ... into LoRA")] = False,
    rank: Annotated[
        float, typer.Option(help="of that LoRA; below 1: the share of the update's energy kept")
    ] = 0.999,
    base: Base = None,
    force: Force = False,
) -> None:
    """Take an adapter out of a run or checkpoint, with tokenizer, model card and record."""
    check_exists(path)
    libraries.load(training=False, freeze=True)
    from lora_exp.after.saving import save as take

    print(take(path, out, as_lora, rank, base, force))


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="adapters or runs of one base")
    ],
    out: Out,
    base: Base = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of the merged weights")] = None,
    device_map: DevicesOption = DeviceMap.one,
    into: Annotated[
        Into, typer.Option(help="the unquantised base, or the quantised one, dequantised")
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
    check_exists(*adapters)
    libraries.load(training=False, freeze=True)
    from lora_exp.after.merging import merge as make

    with on_devices(device_map):
        merged = make(
            adapters, out, base=base, dtype=dtype and dtype.value, into=into.value, method=method,
            weights=shares, density=density, max_shard_size=max_shard_size, force=force,
        )  # fmt: skip
    print(merged)
    command = ["lora-exp", "check", str(merged)]
    command += [word for adapter in adapters for word in ("--adapter", str(adapter))]
    command += ["--base", base] if base else []
    command += ["--device-map", device_map.value] if device_map is DeviceMap.auto else []
    print(f"prove it: {shlex.join(command)}")


def push(
    path: SavedPath,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="of the Hub")],
    public: Annotated[bool, typer.Option("--public", help="visible to everybody")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="write what would be uploaded, and upload nothing")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="the dry run's folder; push-dry-run/NAME unless given"),
    ] = None,
    revision: Annotated[str, typer.Option(help="the branch; made if it does not exist")] = "main",
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    base_id: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="the base's name on the Hub, if it is a folder here"
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Send an adapter or model to the Hugging Face Hub with its card: private unless --public."""
    if out is not None and not dry:
        raise typer.BadParameter("is for --dry-run", param_hint="--out")
    check_exists(path)
    libraries.load(training=False, freeze=True)
    from lora_exp.after import pages, publication
    from lora_exp.record.console import console

    if dry:
        folder = publication.dry_run(path, repo_id, out, base_id, force)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        access = "public" if public else "private"
        text = f"{folder}\nnothing was sent; without --dry-run: to {repo_id}, {revision}, {access}"
    else:
        sent = publication.push(path, repo_id, public, revision, message, base_id)
        files, access = sent["files"], "private" if sent["private"] else "public"
        text = f"{sent['url']}\n{access}, commit {sent['commit']}"
    console.print(pages.parcel(files, text))


def sync(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a run, a sweep, or a folder of several")
    ],
    dry: Annotated[bool, typer.Option("--dry-run", help="show what would be sent")] = False,
) -> None:
    """Send offline W&B runs to W&B: all of a sweep, the parts of a resumed run in their order."""
    from lora_exp.record.console import console
    from lora_exp.record.standing import ASIDE
    from lora_exp.tracking.sync import is_sent, offline_parts, run_id, send

    parts = offline_parts(path, ASIDE)
    sent_before = set(filter(is_sent, parts))
    whole = dry or send(parts)
    for part in parts:
        states = ("sent before", part in sent_before), ("sent", is_sent(part)), ("to send", dry)
        state = next((text for text, holds in states if holds), "NOT SENT")
        place = part.parent.parent.relative_to(path.parent)
        console.print(
            f"{place}  {run_id(part)}  {part.name}  {state}", soft_wrap=True, markup=False
        )
    if not whole:
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: numbers with commas between", param_hint=option
        ) from None
