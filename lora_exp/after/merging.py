"""Adapters merged into their base: a model like any other, for engines that know no adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from transformers import set_seed

from lora_exp.adapter.mounting import add
from lora_exp.after.loading import (
    check_base,
    check_name,
    in_floats,
    load,
    load_base,
    merged,
    tokenizer_of,
)
from lora_exp.after.output import check_free, written
from lora_exp.after.saved import RECORD, Saved, base_config, check_same_base, claim, find
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
SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B")
ONLY_ALONE = (
    "use_dora", "modules_to_save", "trainable_token_indices", "bias", "lora_bias",
    "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "monteclora_config", "velora_config",
)  # fmt: skip
SPARSE = ("ties", "dare", "magnitude")  # these keep a share of each adapter's weights


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
        base: where the base lies, if not where the adapter says.
        dtype: of the saved weights: `float32`, `bfloat16`, `float16`; None: the base's own.
        into: `original`: the unquantised base; `dequantised`: what an adapter that was trained on
            a quantised base saw of it.
        method: how several LoRAs become one, in peft's words; `cat` is their weighted sum exactly.
        weights: of each adapter; None: 1 each.
        density: the share of each adapter's weights that ties, dare and magnitude_prune keep.
        max_shard_size: of a weight file.
        force: replace `out` if it is there.

    Returns:
        The folder.

    Raises:
        SavedError: an adapter is missing or damaged, or `out` is there already.
        AdapterError: an adapter belongs to another base, cannot be merged, or makes weights that
            are not finite.
    """
    quiet()
    folder = Path(out).expanduser()
    several = [find(path) for path in adapters]
    method = {"dare": "dare_linear"}.get(method, method)
    _check(several, into, method, weights)
    if not 0 < density <= 1:
        raise AdapterError(f"density {density:g} is no share to keep; give above 0 and at most 1")
    if not SIZE.fullmatch(max_shard_size):
        raise SavedError(f"--max-shard-size {max_shard_size}: give a size such as 5GB or 500MB")
    place = claim(base)[1] if base else several[0].base
    sources: list[str | Path] = [*(saved.folder for saved in several), place]
    check_free(folder, force, sources)
    for saved in several:
        check_name(saved, base)
    first = several[0]
    dtype = dtype or stored_dtype(base_config(first, base, "none").model)
    if into == "original":
        found = load_base(first, base, "none", dtype)
    else:
        found = in_floats(load_base(first, base))
    for saved in several:
        check_base(saved, found.revision, base)
    model = load(first, found, apart=len(several) > 1).model
    if len(several) > 1:
        shares = list(weights or [1.0] * len(several))
        combine(model, several, shares, method, density)
    model = merged(model)
    model = model.to(getattr(torch, dtype)) if dtype else model
    _check_finite(model)
    tokenizer = tokenizer_of(first, found)
    _settle_ends(model, tokenizer)
    told = {
        "adapters": [identity(saved) for saved in several],
        "base": {"path": found.path, "revision": found.revision},
        "dtype": str(model.dtype).removeprefix("torch."),
        "into": into,
        "quant": first.settings.get("quant") if into == "dequantised" else None,
    }
    if len(several) > 1:
        told |= {"method": method, "weights": shares, "density": density}
    with written(folder, force, sources) as made:
        model.save_pretrained(str(made), max_shard_size=max_shard_size)
        tokenizer.save_pretrained(str(made))
        _describe(made, told, first)
    return folder


def _settle_ends(model: Any, tokenizer: Any) -> None:
    """Let what is saved stop where its training ended turns, or score a row at its end.

    transformers would score the token before an end token that pads, too; without a pad token it
    takes the last, and refuses a batch.
    """
    set_end_tokens(model, tokenizer)
    if not model.can_generate() and tokenizer.pad_token_id == tokenizer.eos_token_id:
        model.config.pad_token_id = None


def _describe(made: Path, told: dict[str, Any], first: Saved) -> None:
    """Write the record of a merge, and the model card."""
    (made / RECORD).write_text(dumps(told, indent=1) + "\n", encoding="utf-8")
    card = first.folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = merged_card(told, first.task_type, text)
    (made / "README.md").write_text(text, encoding="utf-8")


def _check(several: list[Saved], into: Into, method: str, weights: Sequence[float] | None) -> None:
    whole_models = [saved for saved in several if saved.adapter is None]
    if whole_models:
        text = "is a whole model already; only adapters are merged"
        raise SavedError(f"{whole_models[0].folder} {text}")
    if weights is not None and len(weights) != len(several):
        raise AdapterError(f"{len(weights)} weights for {len(several)} adapters; give one for each")
    if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        raise AdapterError(f"weights {list(weights)}: give finite numbers, not all of them 0")
    if weights is not None and len(several) == 1:
        raise AdapterError("weights share several adapters out; here is one")
    if len(several) > 1:
        check_same_base(several)
        if method not in METHODS:
            raise AdapterError(f"method {method!r} is none of {', '.join(METHODS)}")
        for saved in several:
            _check_plain(saved)
    if into == "dequantised" and several[0].quant == "none":
        text = "was not trained on a quantised base, or its run is not known; into=original"
        raise AdapterError(f"{several[0].folder} {text}")


def _check_plain(saved: Saved) -> None:
    """Refuse what peft would lose of an adapter, without a word, when it combines several."""
    config = saved.adapter or {}
    lost = [key for key in ONLY_ALONE if config.get(key) not in (None, False, "none", [], {})]
    rewriting = rewrites_base(config)
    if config["peft_type"] != "LORA" or lost or rewriting:
        other = rewriting if config["peft_type"] == "LORA" else config["peft_type"]
        what = ", ".join(lost) or other
        raise AdapterError(f"{saved.folder}: only plain LoRAs are combined, this has {what}")


def combine(
    model: Any, several: list[Saved], weights: list[float], method: str, density: float
) -> None:
    """Make one adapter of several, the active one.

    Args:
        model: a PeftModel with the first of them.
        several: all of them.
        weights: of each.
        method: in peft's words.
        density: the share that the methods keep which keep one.

    Raises:
        AdapterError: one does not fit, or the method cannot combine them.
    """
    names = ["default"]
    for i, saved in enumerate(several[1:], 1):
        add(model, str(saved.folder), f"adapter{i}")
        names.append(f"adapter{i}")
    set_seed(0)  # dare drops weights at random
    sparse = {"density": density} if method.startswith(SPARSE) else {}
    _place_by_name(model, names)
    model.peft_config["default"].use_rslora = False  # the made one's scaling is to be 1
    try:
        model.add_weighted_adapter(names, weights, "merged", combination_type=method, **sparse)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"{method} cannot combine these: {error}") from error
    model.set_adapter("merged")


def _place_by_name(model: Any, names: list[str]) -> None:
    """Name the modules of each adapter one by one.

    peft gives the combined adapter the first one's layers_to_transform and exclude_modules, which
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
        text = "take --dtype float32 or bfloat16" if model.dtype == torch.float16 else "not saved"
        raise AdapterError(f"{len(bad)} merged weights are not finite ({bad[0]}); {text}")


def identity(saved: Saved) -> dict[str, str]:
    """Return what a merged model's record says of an adapter."""
    files = sorted(saved.folder.glob("adapter_model.*"))
    return {"name": saved.name, "sha256": sha256(files[0])}
