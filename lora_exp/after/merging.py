"""Adapters merged into their base: a whole model, for engines without support for adapters."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from lora_exp.after.base_config import base_config, parse_base
from lora_exp.after.combination import ALIASES, METHODS, Combination, check_plain, combine
from lora_exp.after.loading import (
    check_base,
    check_name,
    in_floats,
    load,
    load_base,
    merged,
    tokenizer_of,
)
from lora_exp.after.output import check_free, output_folder
from lora_exp.after.saved import MERGE_RECORD, Saved, check_same_base, find
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.revision import named
from lora_exp.files.strict import dumps
from lora_exp.files.whole import sha256
from lora_exp.model.loading import Base
from lora_exp.model.precision import is_quantised, stored_dtype
from lora_exp.model.processor_files import copy_processor
from lora_exp.model.special_tokens import set_end_tokens
from lora_exp.model.text_part import fill_whole
from lora_exp.record.card import merged_card
from lora_exp.record.progress import quiet

log = logging.getLogger("lora_exp")
Into = Literal["original", "dequantised"]
SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B")


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    into: Into = "original",
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    max_shard_size: str = "5GB",
    force: bool = False,
) -> Path:
    """Merge adapters into their base and save a whole model, with tokenizer and generation config.

    Args:
        adapters: adapters or runs of one base; several are combined before they are merged.
        out: the folder to make.
        base: the location of the base, if not the one that the adapter names.
        dtype: of the saved weights: `float32`, `bfloat16`, `float16`; None: the base's own.
        into: `original`: the unquantised base; `dequantised`: the quantised base of the training,
            dequantised.
        method: how several LoRAs become one, by peft's name; `cat` is exactly their weighted sum.
        weights: of each adapter; None: 1 each.
        density: the share of each adapter's weights that ties, dare and magnitude_prune keep.
        max_shard_size: of a weight file.
        force: replace `out` if it is there.

    Returns:
        The folder.

    Raises:
        SavedError: an adapter is missing or damaged, or `out` is there already.
        AdapterError: an adapter belongs to another base or cannot be merged, or the merged weights
            are not finite.
    """
    quiet()
    folder, several = Path(out).expanduser(), [find(path) for path in adapters]
    combination = Combination(ALIASES.get(method, method), weights, density)
    _check(several, into, combination, max_shard_size)
    location = parse_base(base)[1] if base else several[0].base
    sources: list[str | Path] = [*(saved.folder for saved in several), location]
    check_free(folder, force, sources)
    merged_model = _merge(several, base, dtype, into, combination)
    with output_folder(folder, force, sources) as staging:
        merged_model.save(staging, several[0], max_shard_size)
    return folder


@dataclass(frozen=True)
class _Merged:
    """A merged model, before it is saved."""

    model: Any
    tokenizer: Any
    base: DictConfig  # the config of the model that it was merged into
    record: dict[str, Any]  # what it was made from

    def save(self, folder: Path, first: Saved, max_shard_size: str) -> None:
        """Write weights, tokenizer, record and model card; the card of `first` is extended."""
        self.model.save_pretrained(str(folder), max_shard_size=max_shard_size)
        self.tokenizer.save_pretrained(str(folder))
        copy_processor(self.base, folder)
        (folder / MERGE_RECORD).write_text(dumps(self.record, indent=1) + "\n", encoding="utf-8")
        card = first.folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        text = merged_card(self.record, text)
        (folder / "README.md").write_text(text, encoding="utf-8")


def _merge(
    several: list[Saved],
    base: str | None,
    dtype: str | None,
    into: Into,
    combination: Combination,
) -> _Merged:
    """Load the base with the adapters, and merge them; see `merge`."""
    for saved in several:
        check_name(saved, base)
    first = several[0]
    dtype = dtype or stored_dtype(base_config(first, base, "none").model)
    if into == "original":
        loaded_base = load_base(first, base, "none", dtype)
        if is_quantised(loaded_base.model):
            into = _dequantised(first, loaded_base)
    else:
        loaded_base = load_base(first, base)
    loaded_base = in_floats(loaded_base)
    for saved in several:
        check_base(saved, loaded_base.revision, base, loaded_base.saved_as)
    model = load(first, loaded_base, apart=len(several) > 1).model
    shares = list(combination.weights or [1.0] * len(several))
    if len(several) > 1:
        combine(model, several, shares, combination.method, combination.density)
    model = merged(model)
    model = model.to(getattr(torch, dtype)) if dtype else model
    _check_finite(model)
    tokenizer = tokenizer_of(first, loaded_base)
    _set_stop_tokens(model, tokenizer)
    if loaded_base.text_of:
        towers = in_floats(load_base(first, base, "none", dtype, whole=True))  # never quantised
        loaded_base, model = towers, fill_whole(towers.model, model)
        model = model.to(getattr(torch, dtype)) if dtype else model
    record: dict[str, Any] = {
        "adapters": [identity(saved) for saved in several],
        "base": {"path": loaded_base.path, "revision": loaded_base.revision},
        "dtype": str(model.dtype).removeprefix("torch."),
        "into": into,
        "quant": _quantisation(first) if into == "dequantised" else None,
        "auto_class": loaded_base.auto_class,
    }
    if len(several) > 1:
        record |= {
            "method": combination.method, "weights": shares, "density": combination.density,
        }  # fmt: skip
    return _Merged(model, tokenizer, base_config(first, base, "none").model, record)


def _quantisation(saved: Saved) -> dict[str, Any]:
    """Return how the base of the training was quantised: the run's section, or as it was saved."""
    return saved.settings.get("quant") or {"quant_type": saved.quant}


def _dequantised(saved: Saved, base: Base) -> Into:
    """Say that a base that was saved quantised has no other weights than its dequantised ones."""
    log.warning(
        "%s was saved quantised (%s): merged into its dequantised weights; --base %s=ORIGINAL"
        " merges into the original",
        base.path, base.saved_as, named(saved.base),
    )  # fmt: skip
    return "dequantised"


def _set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """Set the end tokens with which it was trained; a classifier scores the last token of a row.

    With the end token as the pad token, transformers would score the token before it. Without a
    pad token it scores the last token, but refuses batches.
    """
    set_end_tokens(model, tokenizer)
    if not model.can_generate() and tokenizer.pad_token_id == tokenizer.eos_token_id:
        model.config.pad_token_id = None


def _check(several: list[Saved], into: Into, combination: Combination, max_shard_size: str) -> None:
    _check_adapters(several, combination)
    if into == "dequantised" and several[0].quant == "none":
        text = "was not trained on a quantised base, or its run is missing; use into=original"
        raise AdapterError(f"{several[0].folder} {text}")
    if not 0 < combination.density <= 1:
        text = "is no share; give a number above 0 and at most 1"
        raise AdapterError(f"density {combination.density:g} {text}")
    if not SIZE.fullmatch(max_shard_size):
        raise SavedError(f"--max-shard-size {max_shard_size}: give a size such as 5GB or 500MB")


def _check_adapters(several: list[Saved], combination: Combination) -> None:
    weights = combination.weights
    whole_models = [saved for saved in several if saved.adapter is None]
    if whole_models:
        text = "is a whole model already; only adapters are merged"
        raise SavedError(f"{whole_models[0].folder} {text}")
    if weights is not None and len(weights) != len(several):
        raise AdapterError(f"{len(weights)} weights for {len(several)} adapters; give one for each")
    if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        raise AdapterError(f"weights {list(weights)}: give finite numbers, not all of them 0")
    if weights is not None and len(several) == 1:
        raise AdapterError("weights are for several adapters; this is only one")
    if len(several) > 1:
        check_same_base(several)
        if combination.method not in METHODS:
            raise AdapterError(f"method {combination.method!r} is none of {', '.join(METHODS)}")
        for saved in several:
            check_plain(saved)


def _check_finite(model: Any) -> None:
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        text = "give --dtype float32 or bfloat16" if model.dtype == torch.float16 else "not saved"
        raise AdapterError(f"{len(bad)} merged weights are not finite ({bad[0]}); {text}")


def identity(saved: Saved) -> dict[str, str]:
    """Return an adapter's entry in the record of a merge."""
    files = sorted(saved.folder.glob("adapter_model.*"))
    return {"name": saved.name, "sha256": sha256(files[0])}
