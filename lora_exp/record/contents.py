"""The content of the files that a run is trained with, and whether it has changed. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lora_exp.errors import LoraExpError
from lora_exp.files.paths import asset, is_path
from lora_exp.files.whole import sha256
from lora_exp.model.identity import files_hash, small_files

if TYPE_CHECKING:
    from lora_exp.data.rows import Rows
    from lora_exp.model.loading import Base

CHANGED = "other-content"  # part of the name of a directory that is set aside


def changed_files(directory: Path, cfg: DictConfig) -> list[str]:
    """Return which files of data, base or adapters differ from those that a run was trained with.

    Files on a hub, and files that do not exist any more, are not compared.

    Args:
        directory: that of a finished run.
        cfg: its config, as it would be trained again.
    """
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        data, adapters = dict(record["data"]), dict(record["adapters"])
        pairs = [*_data(cfg, data), *_base(cfg, record), *_adapters(cfg, adapters)]
    except (OSError, ValueError, KeyError, TypeError, LoraExpError):
        return []
    return [name for name, before, after in pairs if before != after]


def input_hashes(cfg: DictConfig, rows: Rows, base: Base) -> dict[str, Any]:
    """Return hashes or commits of data, base and adapters, which must not change on resume."""
    data = dict(rows.source)
    if rows.chat_template is not None:
        template = hashlib.sha256(rows.chat_template.encode()).hexdigest()
        data["chat_template"] = f"sha256:{template}"
    sources = [cfg.adapter, *(cfg.algorithm.rewards if "rewards" in cfg.algorithm else ())]
    folders = [Path(n).expanduser() for n in sources if isinstance(n, str) and is_path(n)]
    files = [path for folder in folders for path in folder.glob("adapter_model.*")]
    adapters = {str(path.parent): f"sha256:{sha256(path)}" for path in files}
    return {
        "data": data,
        "base": base.revision,
        "base_files": small_files(cfg.model.path),
        "adapters": adapters,
    }


def _data(cfg: DictConfig, recorded: dict[str, str]) -> Iterator[tuple[str, Any, Any]]:
    from lora_exp.data.reading import files
    from lora_exp.data.template import template_file

    current = {name: sha256(asset(name)) for name in recorded if asset(name).is_file()}
    if cfg.data.get("chat_template"):
        text = template_file(cfg.data.chat_template).read_text(encoding="utf-8")
        current["chat_template"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if cfg.data._target_ == "lora_exp.data.rows.jsonl":  # a glob may match other files than before
        for pattern in filter(None, (cfg.data.path, cfg.data.eval_path)):
            paths = files(pattern)
            current |= {pattern if len(paths) == 1 else str(p): sha256(p) for p in paths}
    elif cfg.data._target_ == "lora_exp.data.rows.hub" and Path(cfg.data.path).is_dir():
        paths = [p for p in Path(cfg.data.path).rglob("*") if p.is_file()]  # as `rows.hub` does
        current |= {str(p): sha256(p) for p in paths}
    else:
        recorded = {name: digest for name, digest in recorded.items() if name in current}
    for name in recorded.keys() | current.keys():
        yield name, recorded.get(name), current.get(name)


def _base(cfg: DictConfig, record: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    folder = asset(cfg.model.path)
    if not folder.exists():
        return
    if record["base"] is not None:
        yield cfg.model.path, record["base"], _hash(folder, cfg.model.gguf_file)
    if "base_files" in record:  # earlier versions did not record them
        recorded, current = record["base_files"], small_files(cfg.model.path)
        for name in sorted(recorded.keys() | current.keys()):
            yield f"{cfg.model.path}/{name}", recorded.get(name), current.get(name)


def _adapters(cfg: DictConfig, recorded: dict[str, str]) -> Iterator[tuple[str, Any, Any]]:
    sources = [cfg.adapter, *(cfg.algorithm.rewards if "rewards" in cfg.algorithm else ())]
    for name in sources:
        if isinstance(name, str) and is_path(name):
            for path in Path(name).expanduser().glob("adapter_model.*"):
                yield name, recorded.get(str(path.parent)), f"sha256:{sha256(path)}"


@cache
def _hash(folder: Path, gguf_file: str | None) -> str | None:
    return files_hash(folder, gguf_file)
