"""Adapters merged into their base: a whole model, for engines without support for adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from transformers import set_seed

from lora_exp.adapter.mounting import mount_beside
from lora_exp.after.base_config import base_config, parse_base
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
from lora_exp.config.initialization import rewrites_base
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.strict import dumps
from lora_exp.files.whole import sha256
from lora_exp.model.precision import stored_dtype
from lora_exp.model.special_tokens import set_end_tokens
from lora_exp.record.card import merged_card
from lora_exp.record.progress import quiet

Into = Literal["original", "dequantised"]
METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
ALIASES = {"dare": "dare_linear"}  # of methods
SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B")
# settings of an adapter that peft ignores when it combines several
NOT_COMBINED = (
    "use_dora", "modules_to_save", "trainable_token_indices", "bias", "lora_bias",
    "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "monteclora_config", "velora_config",
)  # fmt: skip
SPARSE = ("ties", "dare", "magnitude")  # these keep a share of each adapter's weights


@dataclass(frozen=True)
class Combination:
    """How several adapters become one; unused for a single adapter."""

    method: str  # by peft's name
    weights: Sequence[float] | None  # of each adapter; None: 1 each
    density: float  # the share of each adapter's weights that ties, dare and magnitude_prune keep


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
    record: dict[str, Any]  # what it was made from

    def save(self, folder: Path, first: Saved, max_shard_size: str) -> None:
        """Write weights, tokenizer, record and model card; the card of `first` is extended."""
        self.model.save_pretrained(str(folder), max_shard_size=max_shard_size)
        self.tokenizer.save_pretrained(str(folder))
        (folder / MERGE_RECORD).write_text(dumps(self.record, indent=1) + "\n", encoding="utf-8")
        card = first.folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        text = merged_card(self.record, first.task_type, text)
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
    else:
        loaded_base = in_floats(load_base(first, base))
    for saved in several:
        check_base(saved, loaded_base.revision, base)
    model = load(first, loaded_base, apart=len(several) > 1).model
    shares = list(combination.weights or [1.0] * len(several))
    if len(several) > 1:
        combine(model, several, shares, combination.method, combination.density)
    model = merged(model)
    model = model.to(getattr(torch, dtype)) if dtype else model
    _check_finite(model)
    tokenizer = tokenizer_of(first, loaded_base)
    _set_stop_tokens(model, tokenizer)
    record: dict[str, Any] = {
        "adapters": [identity(saved) for saved in several],
        "base": {"path": loaded_base.path, "revision": loaded_base.revision},
        "dtype": str(model.dtype).removeprefix("torch."),
        "into": into,
        "quant": first.settings.get("quant") if into == "dequantised" else None,
    }
    if len(several) > 1:
        record |= {
            "method": combination.method, "weights": shares, "density": combination.density,
        }  # fmt: skip
    return _Merged(model, tokenizer, record)


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
            _check_plain(saved)


def _check_plain(saved: Saved) -> None:
    """Refuse an adapter of which peft would silently drop something when it combines several."""
    config = saved.adapter or {}
    dropped = [key for key in NOT_COMBINED if config.get(key) not in (None, False, "none", [], {})]
    rewriting = rewrites_base(config)
    if config["peft_type"] != "LORA" or dropped or rewriting:
        reason = rewriting if config["peft_type"] == "LORA" else config["peft_type"]
        reason = ", ".join(dropped) or reason
        raise AdapterError(f"{saved.folder}: only plain LoRAs are combined, this has {reason}")


def combine(
    model: Any, several: list[Saved], weights: list[float], method: str, density: float
) -> None:
    """Combine several adapters into one, and make it the active one.

    Args:
        model: a PeftModel with the first of them.
        several: all of them.
        weights: of each.
        method: by peft's name.
        density: the share of each adapter's weights that ties, dare and magnitude_prune keep.

    Raises:
        AdapterError: one does not fit, or the method cannot combine them.
    """
    names = ["default"]
    for i, saved in enumerate(several[1:], 1):
        mount_beside(model, str(saved.folder), f"adapter{i}")
        names.append(f"adapter{i}")
    set_seed(0)  # dare drops weights at random
    sparse = {"density": density} if method.startswith(SPARSE) else {}
    _place_by_name(model, names)
    model.peft_config["default"].use_rslora = False  # or peft would scale the combined adapter
    try:
        model.add_weighted_adapter(names, weights, "merged", combination_type=method, **sparse)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"{method} cannot combine these: {error}") from error
    model.set_adapter("merged")


def _place_by_name(model: Any, names: list[str]) -> None:
    """Name the modules of each adapter one by one.

    peft gives the combined adapter layers_to_transform and exclude_modules of the first, which
    would leave out modules of the others.
    """
    for name in names:
        config = model.peft_config[name]
        config.target_modules = {
            place
            for place, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and name in module.r
        }
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def _check_finite(model: Any) -> None:
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        text = "give --dtype float32 or bfloat16" if model.dtype == torch.float16 else "not saved"
        raise AdapterError(f"{len(bad)} merged weights are not finite ({bad[0]}); {text}")


def identity(saved: Saved) -> dict[str, str]:
    """Return an adapter's entry in the record of a merge."""
    files = sorted(saved.folder.glob("adapter_model.*"))
    return {"name": saved.name, "sha256": sha256(files[0])}
