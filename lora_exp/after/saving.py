"""An adapter taken out of its run, to travel: weights, tokenizer, card and record in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lora_exp.adapter.untrusted import read_weights
from lora_exp.after.inspection import modules
from lora_exp.after.loading import load, load_base
from lora_exp.after.output import check_free, written
from lora_exp.after.saved import Saved, find
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.errors import AdapterError, SavedError
from lora_exp.record.card import model_card
from lora_exp.record.progress import quiet

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "spiece.model",
)  # fmt: skip
RECORD = ("run.json", "config.yaml")


def save(
    path: str | Path,
    out: str | Path,
    as_lora: bool = False,
    rank: float = 0.999,
    base: str | None = None,
    force: bool = False,
) -> Path:
    """Take an adapter out of a run or a checkpoint.

    Args:
        path: the run, checkpoint or adapter.
        out: the folder to make.
        as_lora: write LoHa, LoKr and others as the LoRA that is nearest, for engines that know
            only LoRA.
        rank: of that LoRA; below 1 it is the share of each update's energy to keep.
        base: where the base lies, if not where the adapter says; it is needed for `as_lora` only.
        force: replace `out` if it is there.

    Returns:
        The folder.

    Raises:
        SavedError: there is no adapter, or `out` is there already.
        AdapterError: peft cannot turn this method into LoRA, or not of this rank.
    """
    saved = find(path)
    if saved.adapter is None:
        raise SavedError(f"{saved.folder} is a whole model; copy its folder, or push it")
    _check_converted(saved)
    if rank <= 0 or (rank > 1 and rank % 1):
        raise AdapterError(f"rank {rank:g}: give a whole number, or a share below 1")
    folder = Path(out).expanduser()
    check_free(folder, force, [saved.folder])
    with written(folder, force, [saved.folder]) as made:
        if as_lora:
            _write_as_lora(saved, made, rank, base)
        else:
            _write(saved, made)
        for pattern in TOKENIZER:
            for file in saved.folder.glob(pattern):
                shutil.copy(file, made / file.name)
        for name in RECORD if saved.run else ():
            if saved.run and (saved.run / name).is_file():
                shutil.copy(saved.run / name, made / name)
        card = saved.folder / "README.md"
        kept = card.is_file() and not as_lora
        text = card.read_text(encoding="utf-8") if kept else _card(saved, as_lora)
        (made / "README.md").write_text(text, encoding="utf-8")
    return folder


def _check_converted(saved: Saved) -> None:
    """Refuse a checkpoint whose adapter is not yet the difference to the original base."""
    assert saved.adapter is not None
    if saved.settings and saved_as_plain_lora(saved.adapter):
        start = saved.adapter["init_lora_weights"]
        text = f"is {start} before its end, which fits only the base that it rewrote"
        raise AdapterError(f"{saved.folder} {text}; resume={saved.run} ends it and converts it")


def _write(saved: Saved, made: Path) -> None:
    config = dict(saved.adapter or {}) | {"base_model_name_or_path": saved.base}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    text = json.dumps(config, indent=2, sort_keys=True)
    (made / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    source = saved.folder / "adapter_model.safetensors"
    weights = read_weights(str(saved.folder))
    modules(weights, config, str(saved.folder))  # each one's parts fit
    if source.is_file():
        shutil.copy(source, made / source.name)
        return
    tensors = {key: value.contiguous() for key, value in weights.items()}
    save_file(tensors, made / source.name, metadata={"format": "pt"})


def _write_as_lora(saved: Saved, made: Path, rank: float, base: str | None) -> None:
    quiet()
    loaded = load(saved, load_base(saved, base, "none"))
    method = loaded.model.peft_config["default"].peft_type.value
    if method == "LORA":
        raise AdapterError(f"{saved.folder} is LoRA already; leave --as-lora out")
    try:
        peft.save_as_lora(str(made), loaded.model, rank=int(rank) if rank >= 1 else rank)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"{method} cannot be written as LoRA: {error}") from error
    config: dict[str, Any] = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = saved.base
    text = json.dumps(config, indent=2, sort_keys=True)
    (made / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _card(saved: Saved, as_lora: bool) -> str:
    """Return a card for an adapter that has none yet, as checkpoints have: its run's so far."""
    config = saved.adapter or {}
    kind, how = config["peft_type"], ""
    if as_lora:
        kind, how = "LORA", f" and turned from {kind} into the nearest LoRA"
    said = f"{kind} adapter for `{saved.base}`, taken from `{saved.folder.name}`{how}."
    if saved.settings and "data" in saved.record:
        told = model_card(OmegaConf.create(saved.settings), saved.record)
        return told.replace("Trained with", f"{said} Trained with", 1)
    name = saved.record.get("name", saved.folder.name)
    return f"---\nlibrary_name: peft\ntags:\n- lora-exp\n---\n\n# {name}\n\n{said}\n"
