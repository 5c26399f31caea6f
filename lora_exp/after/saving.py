"""An adapter copied out of its run: weights, tokenizer, card and record in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lora_exp.adapter.untrusted import read_weights
from lora_exp.adapter.updates import modules
from lora_exp.after.loading import load, load_base
from lora_exp.after.output import check_free, output_folder
from lora_exp.after.saved import Saved, find
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.errors import AdapterError, SavedError
from lora_exp.record.card import model_card
from lora_exp.record.progress import quiet

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "spiece.model",
)  # fmt: skip
RUN_FILES = ("run.json", "config.yaml")


def save(
    path: str | Path,
    out: str | Path,
    as_lora: bool = False,
    rank: float = 0.999,
    base: str | None = None,
    force: bool = False,
) -> Path:
    """Copy an adapter out of a run or a checkpoint.

    Args:
        path: the run, checkpoint or adapter.
        out: the folder to make.
        as_lora: convert LoHa, LoKr and others to the nearest LoRA, for engines that support
            only LoRA.
        rank: of that LoRA; below 1: the share of each update's energy to keep.
        base: the location of the base, if not the one that the adapter names; only for `as_lora`.
        force: replace `out` if it is there.

    Returns:
        The folder.

    Raises:
        SavedError: there is no adapter, or `out` is there already.
        AdapterError: peft cannot convert this method to LoRA, or not with this rank.
    """
    saved = find(path)
    if saved.adapter is None:
        raise SavedError(f"{saved.folder} is a whole model; copy its folder, or push it")
    _check_converted(saved)
    if rank <= 0 or (rank > 1 and rank % 1):
        raise AdapterError(f"rank {rank:g}: give a whole number, or a share below 1")
    folder = Path(out).expanduser()
    check_free(folder, force, [saved.folder])
    with output_folder(folder, force, [saved.folder]) as staging:
        if as_lora:
            _write_as_lora(saved, staging, rank, base)
        else:
            _write(saved, staging)
        _copy_files(saved, staging)
        card = saved.folder / "README.md"
        keep_card = card.is_file() and not as_lora
        text = card.read_text(encoding="utf-8") if keep_card else _card(saved, as_lora)
        (staging / "README.md").write_text(text, encoding="utf-8")
    return folder


def _check_converted(saved: Saved) -> None:
    """Refuse a checkpoint whose adapter is not yet the difference to the original base."""
    assert saved.adapter is not None
    if saved.settings and saved_as_plain_lora(saved.adapter):
        start = saved.adapter["init_lora_weights"]
        text = f"is {start} before its end, and fits only the base that {start} changed"
        raise AdapterError(f"{saved.folder} {text}; resume={saved.run} finishes and converts it")


def _write(saved: Saved, folder: Path) -> None:
    config = dict(saved.adapter or {}) | {"base_model_name_or_path": saved.base}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    source = saved.folder / "adapter_model.safetensors"
    weights = read_weights(str(saved.folder))
    modules(weights, config, str(saved.folder))  # raises if the shapes do not fit
    if source.is_file():
        shutil.copy(source, folder / source.name)
        return
    tensors = {key: value.contiguous() for key, value in weights.items()}
    save_file(tensors, folder / source.name, metadata={"format": "pt"})


def _write_as_lora(saved: Saved, folder: Path, rank: float, base: str | None) -> None:
    quiet()
    loaded = load(saved, load_base(saved, base, "none"))
    method = loaded.model.peft_config["default"].peft_type.value
    if method == "LORA":
        raise AdapterError(f"{saved.folder} is LoRA already; leave --as-lora out")
    try:
        peft.save_as_lora(str(folder), loaded.model, rank=int(rank) if rank >= 1 else rank)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"{method} cannot be written as LoRA: {error}") from error
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = saved.base
    text = json.dumps(config, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _copy_files(saved: Saved, folder: Path) -> None:
    """Copy the tokenizer, and the record and config of the run."""
    for pattern in TOKENIZER:
        for file in saved.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    for name in RUN_FILES if saved.run else ():
        if saved.run and (saved.run / name).is_file():
            shutil.copy(saved.run / name, folder / name)


def _card(saved: Saved, as_lora: bool) -> str:
    """Return a card for an adapter without one, such as a checkpoint's."""
    config = saved.adapter or {}
    method, conversion = config["peft_type"], ""
    if as_lora:
        method, conversion = "LORA", f" and converted from {method} to the nearest LoRA"
    origin = f"{method} adapter for `{saved.base}`, taken from `{saved.folder.name}`{conversion}."
    if saved.settings and "data" in saved.record:
        card = model_card(OmegaConf.create(saved.settings), saved.record)
        return card.replace("Trained with", f"{origin} Trained with", 1)
    name = saved.record.get("name", saved.folder.name)
    return f"---\nlibrary_name: peft\ntags:\n- lora-exp\n---\n\n# {name}\n\n{origin}\n"
