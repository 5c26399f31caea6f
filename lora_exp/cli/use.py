"""Commands of the help panel Use: chat, serve, generate."""

from __future__ import annotations

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
    QuantOption,
    SavedPath,
    SavedPaths,
    check_exists,
    on_devices,
)


class Engine(StrEnum):
    """Engines of the server."""

    transformers = "transformers"
    vllm = "vllm"


def chat(
    paths: SavedPaths,
    base: Base = None,
    quant: QuantOption = None,
    device_map: DevicesOption = DeviceMap.one,
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter first")] = False,
    system: Annotated[str | None, typer.Option(help="the system prompt")] = None,
) -> None:
    """Talk to what was trained; several adapters answer beside their base. Pipes work too."""
    check_exists(*paths)
    libraries.load(training=False, freeze=True)
    from lora_exp.after.chat import Chat, open_chat

    with on_devices(device_map):
        answered = Chat(open_chat(paths, base, quant and quant.value, merge, system)).run()
    if not answered:
        raise typer.Exit(1)


def serve(
    paths: SavedPaths,
    base: Base = None,
    quant: QuantOption = None,
    device_map: DevicesOption = DeviceMap.one,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 answers the whole network, which needs no key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free", min=0, max=65535)] = 8000,
    engine: Annotated[
        Engine, typer.Option(help="vllm, where it is installed, is faster on a GPU")
    ] = Engine.transformers,
) -> None:
    """Serve what was trained as OpenAI's interface does: each adapter is a model, and the base."""
    if engine is Engine.vllm and device_map is DeviceMap.auto:
        raise typer.BadParameter("is for --engine transformers", param_hint="--device-map")
    check_exists(*paths)
    libraries.load(training=False, freeze=True)
    from lora_exp.after import pages, serving

    def ready(url: str, chats: dict[str, bool]) -> None:
        print(pages.serving(url, chats), flush=True)

    with on_devices(device_map):
        serving.serve(paths, ready, base, quant and quant.value, host, port, engine.value)


def generate(
    path: SavedPath,
    prompts: Annotated[str, typer.Option(help="JSON lines (or a glob) with prompts")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the JSON lines file to make")],
    base: Base = None,
    quant: QuantOption = None,
    device_map: DevicesOption = DeviceMap.one,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: the most likely token each time", min=0.0)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="sample from the tokens that make up this share of the probability",
            min=0.0,
            max=1.0,
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    batch_size: Annotated[int, typer.Option(help="prompts at a time", min=1)] = 16,
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="a prompt that is text is a user's turn")
    ] = False,
    force: Force = False,
) -> None:
    """Answer a file of prompts; the same command continues an interrupted one."""
    check_exists(path)
    libraries.load(training=False, freeze=True)
    from lora_exp.after.completion import generate as answer

    with on_devices(device_map):
        file = answer(
            path, prompts, out, base=base, quant=quant and quant.value,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            batch_size=batch_size, as_chat=as_chat, force=force,
        )  # fmt: skip
    print(file)
