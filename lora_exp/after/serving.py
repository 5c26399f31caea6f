"""Trained models served with OpenAI's HTTP interface: each adapter is a model with its own name."""

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

from lora_exp.adapter.untrusted import read_weights
from lora_exp.after.base_config import base_config
from lora_exp.after.loading import Loaded, check_base, load, load_base, side_by_side
from lora_exp.after.saved import NO_BIAS, Saved, find_all
from lora_exp.config.initialization import rewrites_base
from lora_exp.errors import AdapterError, SavedError, ServeError
from lora_exp.files.paths import asset
from lora_exp.model.identity import files_hash
from lora_exp.model.precision import dtype_of
from lora_exp.record.progress import quiet

Engine = Literal["transformers", "vllm"]
BASE = "base"  # the name of the base alone among the adapters
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest rank
# settings of an adapter that vLLM ignores, or refuses while it starts
IGNORED_BY_VLLM = (
    "use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "monteclora_config", "fan_in_fan_out",
)  # fmt: skip
NOT_SERVED = {  # tasks, and why
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
        paths: adapters, runs or a whole model; `NAME=PATH` sets a name.
        ready: called once requests are answered, with the address, and each model's name with
            whether it has a chat template.
        base: the location of the base, if not the one that the adapter names.
        quant: how to quantise the base; None: as in the run of the first adapter.
        host: the address to listen on.
        port: 0: any free port.
        engine: `transformers`: its own server, in this process; `vllm`: replaces this process.

    Raises:
        SavedError: a model does not answer, or two have the same name.
        AdapterError: the adapters have different bases, or vLLM does not support one.
        ServeError: the port is taken, or a package that the engine needs is not installed.
    """
    several = find_all(paths)
    _check(several)
    if engine == "vllm":
        _replace_by_vllm(vllm_command(several, base, quant, host, port))
    if not is_serve_available():
        raise ServeError('fastapi, uvicorn or openai is missing: pip install "lora-exp[serve]"')
    with _listen(host, port) as listener:
        models = _load(several, base, quant)
        from lora_exp.after.endpoints import Models, Server

        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        chats = {loaded.name: loaded.tokenizer.chat_template is not None for loaded in models}
        Server(Models(models), lambda: ready(url, chats)).run([listener])


def _check(several: list[Saved]) -> None:
    for saved in several:
        if saved.task_type in NOT_SERVED:
            raise SavedError(f"{saved.folder} {NOT_SERVED[saved.task_type]}")
        if saved.adapter is not None and saved.name == BASE:
            text = f"has the name of the base, {BASE}; give another: NAME={saved.folder}"
            raise SavedError(f"{saved.folder} {text}")


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything is loaded; clients that connect meanwhile wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        option = "--host" if isinstance(error, socket.gaierror) else "--port"
        text = f"cannot listen on {host}:{port}: {reason}; give another {option}"
        raise ServeError(text) from error


def _load(several: list[Saved], base: str | None, quant: str | None) -> list[Loaded]:
    quiet()
    loaded_base = load_base(several[0], base, quant)
    if several[0].adapter is None:
        return [load(several[0], loaded_base)]
    adapters = side_by_side(several, loaded_base, base)
    return [*adapters, Loaded(BASE, loaded_base.model.eval(), adapters[0].tokenizer)]


def vllm_command(
    several: Sequence[Saved], base: str | None, quant: str | None, host: str, port: int
) -> list[str]:
    """Return the command that serves the same models with vLLM, under the same names.

    Raises:
        AdapterError: an adapter is no plain LoRA or has another base, or vLLM does not support the
            quantisation.
    """
    first = several[0]
    model = base_config(first, base, quant).model
    path = asset(model.path)
    revision = files_hash(path, None) if path.is_dir() else model.revision
    for saved in several:
        check_base(saved, revision, base)
    listen = ["--host", host, "--port", str(port)]
    command = ["vllm", "serve", str(path), *listen]
    if model.revision:
        command += ["--revision", model.revision]
    quant = quant or first.quant
    if quant not in ("none", "nf4"):
        text = f"vLLM quantises as nf4 only, not {quant}; give --quant nf4 or --quant none"
        raise AdapterError(text)
    if quant == "nf4":
        command += ["--quantization", "bitsandbytes"]
    else:  # without it vLLM rounds float32 to bfloat16
        command += ["--dtype", str(dtype_of(model.dtype)).removeprefix("torch.")]
    if first.adapter is None:
        return [*command, "--served-model-name", first.name]
    largest = max(_rank(saved) for saved in several)
    rank = next(rank for rank in RANKS if rank >= largest)
    modules = [json.dumps({"name": s.name, "path": str(s.folder.resolve())}) for s in several]
    command += ["--served-model-name", BASE, "--enable-lora", "--max-lora-rank", str(rank)]
    return [*command, "--lora-modules", *modules]


def _rank(saved: Saved) -> int:
    """Return an adapter's rank; its scaling must be that of alpha and rank, or of rsLoRA.

    Raises:
        AdapterError: vLLM would serve it otherwise than peft, or not at all.
    """
    config = saved.adapter or {}
    cure = f"lora-exp merge {saved.folder} -o OUT, and serve that"
    why = [key for key in IGNORED_BY_VLLM if config.get(key)]
    why += [rewriting] if (rewriting := rewrites_base(config)) else []
    why += ["bias"] if saved.bias != NO_BIAS else []
    why += [key for key in read_weights(str(saved.folder)) if ".lora_" not in key][:1]
    if config["peft_type"] != "LORA" or why:
        reason = f" ({', '.join(why)})" if why else ""
        text = f"is no plain LoRA{reason}, and vLLM serves no other"
        raise AdapterError(f"{saved.folder} {text}: {cure}")
    if scaled := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        text = f"has {' and '.join(scaled)}, and vLLM scales all modules equally"
        raise AdapterError(f"{saved.folder} {text}: {cure}")
    rank = int(config["r"])
    if rank > RANKS[-1]:
        raise AdapterError(f"{saved.folder} has rank {rank}, and vLLM takes {RANKS[-1]}: {cure}")
    return rank


def _replace_by_vllm(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        text = "vllm is not installed: pip install vllm, or give --engine transformers"
        raise ServeError(text)
    print(shlex.join(command), flush=True)
    os.execvp(command[0], command)
