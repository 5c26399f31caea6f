"""Trained models behind OpenAI's HTTP interface: each adapter is a model of its own name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from transformers.utils.import_utils import is_serve_available

from lora_exp.after.loading import (
    Loaded,
    check_base,
    load,
    load_base,
    side_by_side,
)
from lora_exp.after.saved import Saved, base_config, find_all
from lora_exp.errors import AdapterError, SavedError, ServeError
from lora_exp.files.paths import asset
from lora_exp.model.identity import files_hash
from lora_exp.model.precision import dtype_of
from lora_exp.record.progress import quiet

Engine = Literal["transformers", "vllm"]
BASE = "base"  # the bare base, among adapters
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as its largest
# what vLLM passes over in an adapter
UNKNOWN = (
    "use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication",
    "target_parameters", "use_qalora", "alora_invocation_tokens",
)  # fmt: skip
SILENT = {
    "SEQ_CLS": "gives scores (algorithm=reward), it does not answer",
    "SEQ_2_SEQ_LM": "is an encoder-decoder; only decoders are served",
}


def serve(
    paths: Sequence[str | Path],
    ready: Callable[[str, dict[str, bool]], None],
    base: str | None = None,
    quant: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: Engine = "transformers",
) -> None:
    """Serve a model, or adapters and their base, until SIGINT or SIGTERM.

    Args:
        paths: adapters, runs or a whole model; `NAME=PATH` names one.
        ready: is told, once requests are answered, the address and each model's name, and whether
            it has a chat template.
        base: where the base lies, if not where the adapter says.
        quant: how to hold the base; None: as the first one's run did.
        host: the address to listen on.
        port: 0 takes any that is free.
        engine: `transformers`: its own server, in this process; `vllm`: replaces this process.

    Raises:
        SavedError: nothing that answers, or two of one name.
        AdapterError: adapters of different bases, or of a kind that vLLM does not know.
        ServeError: the port is taken, or what the engine needs is not installed.
    """
    several = find_all(paths)
    _check(several)
    if engine == "vllm":
        _become_vllm(vllm_command(several, base, quant, host, port))
    if not is_serve_available():
        raise ServeError('fastapi, uvicorn or openai is missing: pip install "lora-exp[serve]"')
    with _listen(host, port) as listener:
        served = _load(several, base, quant)
        from lora_exp.after.endpoints import Models, Server

        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        chats = {loaded.name: loaded.tokenizer.chat_template is not None for loaded in served}
        Server(Models(served), lambda: ready(url, chats)).run([listener])


def _check(several: list[Saved]) -> None:
    for saved in several:
        if saved.task_type in SILENT:
            raise SavedError(f"{saved.folder} {SILENT[saved.task_type]}")
        if saved.adapter is not None and saved.name == BASE:
            text = f"is called {BASE}, as the bare base is; name it: NAME={saved.folder}"
            raise SavedError(f"{saved.folder} {text}")


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything is loaded; who connects meanwhile waits."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        other = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise ServeError(f"cannot listen on {host}:{port}: {why}; give another {other}") from error


def _load(several: list[Saved], base: str | None, quant: str | None) -> list[Loaded]:
    quiet()
    found = load_base(several[0], base, quant)
    if several[0].adapter is None:
        return [load(several[0], found)]
    adapters = side_by_side(several, found)
    return [*adapters, Loaded(BASE, found.model.eval(), adapters[0].tokenizer)]


def vllm_command(
    several: Sequence[Saved], base: str | None, quant: str | None, host: str, port: int
) -> list[str]:
    """Return the command line that has vLLM serve the same, under the same names.

    Raises:
        AdapterError: an adapter is no plain LoRA, or of another base, or that is held as vLLM
            cannot.
    """
    first = several[0]
    model = base_config(first, base, quant).model
    place = asset(model.path)
    revision = files_hash(place, None) if place.is_dir() else model.revision
    for saved in several:
        check_base(saved, revision, base)
    listen = ["--host", host, "--port", str(port)]
    command = ["vllm", "serve", str(place), *listen]
    if model.revision:
        command += ["--revision", model.revision]
    held = quant or first.quant
    if held not in ("none", "nf4"):
        raise AdapterError(f"vLLM quantises as nf4 only, not {held}; --quant nf4 or --quant none")
    if held == "nf4":
        command += ["--quantization", "bitsandbytes"]
    else:  # it would round float32 to bfloat16
        command += ["--dtype", str(dtype_of(model.dtype)).removeprefix("torch.")]
    if first.adapter is None:
        return [*command, "--served-model-name", first.name]
    largest = max(_rank(saved) for saved in several)
    rank = next(known for known in RANKS if known >= largest)
    named = [json.dumps({"name": s.name, "path": str(s.folder.resolve())}) for s in several]
    command += ["--served-model-name", BASE, "--enable-lora", "--max-lora-rank", str(rank)]
    return [*command, "--lora-modules", *named]


def _rank(saved: Saved) -> int:
    config = saved.adapter or {}
    cure = f"lora-exp merge {saved.folder} -o OUT, and serve that"
    plain = config["peft_type"] == "LORA" and not any(config.get(key) for key in UNKNOWN)
    if not plain or config.get("bias", "none") != "none":
        raise AdapterError(f"{saved.folder} is no plain LoRA, which is all that vLLM knows: {cure}")
    if scaled := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        text = f"has {' and '.join(scaled)}, and vLLM scales all modules alike"
        raise AdapterError(f"{saved.folder} {text}: {cure}")
    rank = int(config["r"])
    if rank > RANKS[-1]:
        raise AdapterError(f"{saved.folder} has rank {rank}, and vLLM takes {RANKS[-1]}: {cure}")
    return rank


def _become_vllm(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        text = "vllm is not installed: pip install vllm, or --engine transformers"
        raise ServeError(text)
    print(shlex.join(command), flush=True)
    os.execvp(command[0], command)
