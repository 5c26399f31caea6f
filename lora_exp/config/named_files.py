"""Files and commits that a config names: there, and pinned where that is asked for."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator

from lora_exp.config.door import Section
from lora_exp.config.ranges import Fault, is_number
from lora_exp.data.template import template_file
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset, near_names
from lora_exp.files.revision import is_commit


def named_file_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each local file that is missing; those on a hub are checked later."""
    yield from _model_files(cfg)
    if cfg.strict:
        yield from _unpinned(cfg)
    if cfg.data._target_ != "lora_exp.data.rows.jsonl":
        return
    for key in ("path", "eval_path", "chat_template"):
        name = cfg.data[key]
        if not isinstance(name, str):
            continue  # null, or a fault already
        try:
            path = template_file(name) if key == "chat_template" else asset(name)
        except ConfigError as error:
            yield f"data.{key}", error.faults[0][1]
            continue
        if not glob.glob(str(path), recursive=True):  # noqa: PTH207
            near = near_names(path)
            yield f"data.{key}", f"no file matches {name}{near}"


def _unpinned(cfg: Section) -> Iterator[Fault]:
    """Refuse hub revisions that may change; local files are recorded with their hashes."""
    for key in ("model", "data"):
        node = cfg[key]
        hub = key == "model" or node._target_ == "lora_exp.data.rows.hub"
        if hub and not asset(str(node.path)).exists() and not is_commit(node.revision):
            text = f"strict=true: pin {node.path} to a commit, its 40 hexadecimal digits"
            yield f"{key}.revision", text


def _model_files(cfg: Section) -> Iterator[Fault]:
    path, gguf_file = str(cfg.model.path), cfg.model.gguf_file
    try:
        folder = asset(path)
    except ConfigError as error:
        yield "model.path", error.faults[0][1]
        return
    if path.startswith(("/", ".", "~", "pkg://")) and not folder.exists():
        yield "model.path", f"no such folder: {path}"
    if (folder / "adapter_config.json").is_file():
        is_model = (folder / "config.json").is_file()
        text = f"{path} {'also has' if is_model else 'is'} an adapter (adapter_config.json)"
        cure = "take that file out" if is_model else f"give its base, and adapter={path}"
        yield "model.path", f"{text}; {cure}"
    if isinstance(gguf_file, str) and folder.is_dir() and not (folder / gguf_file).is_file():
        near = near_names(folder / gguf_file, "*.gguf")
        yield "model.gguf_file", f"no such file in {path}{near}"
    args = cfg.algorithm.args
    length = args.get("max_length")
    if is_number(length) and length < 1:
        yield "algorithm.args.max_length", f"{length!r} is not 1 or more"
    elif is_number(length) and (folder / "config.json").is_file():
        context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        if context and length > context:
            text = f"{length} is longer than the model's context of {context} tokens"
            yield "algorithm.args.max_length", text
    if args.get("packing") and length is None:
        yield "algorithm.args.max_length", "packing fills sequences of this length; give a number"
