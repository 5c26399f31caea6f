"""A saved adapter on its base, or a saved model: to answer, to measure, or to train on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoTokenizer

from lora_exp.adapter.mounting import mount, read_config
from lora_exp.after.base_config import base_config, parse_base
from lora_exp.after.saved import NO_BIAS, Saved, find
from lora_exp.config.initialization import rewrites_base
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.revision import comparable, named
from lora_exp.model.loading import Base, base_of
from lora_exp.model.placement import DeviceMap, placed
from lora_exp.model.precision import autocast, is_quantised
from lora_exp.model.quantised import dequantise
from lora_exp.model.sharing import sharing_copy
from lora_exp.model.special_tokens import ensure_pad_token
from lora_exp.model.text_part import untie
from lora_exp.model.vocabulary import missing_embeddings
from lora_exp.record.console import console
from lora_exp.record.progress import quiet


@dataclass(frozen=True)
class Loaded:
    """A model that answers, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Compute without gradients, in the precision in which such a base is trained."""
        with torch.no_grad(), autocast(self.model):
            yield


def load_adapter(
    path: str | Path,
    merge: bool = False,
    quant: str | None = None,
    base: str | None = None,
    trainable: bool = False,
    device_map: DeviceMap | None = None,
) -> tuple[Any, Any]:
    """Load what a run saved, on its base.

    Args:
        path: an adapter, a run, a checkpoint or a whole model.
        merge: true: return the base with the adapter merged in; a quantised base is dequantised.
        quant: `nf4`, `fp4`, `int8` or `none`; None: as in its run.
        base: the location of the base, if not the one that the adapter names; `NAME=PLACE` if the
            base has another name there.
        trainable: true: the adapter's weights take gradients, or all of a merged model's.
        device_map: `auto` for a base that is too big for one device; None: one device.

    Returns:
        The model, a PeftModel unless it was merged or is whole, and its tokenizer.

    Raises:
        SavedError: there is nothing to load.
        AdapterError: it does not belong to this base.
        ConfigError: the base cannot be loaded.
    """
    quiet()
    saved = find(path)
    with placed(device_map):
        loaded_base = load_base(saved, base, quant)
    if merge and saved.adapter is not None:
        loaded = load(saved, in_floats(loaded_base))
        return merged(loaded.model).train(trainable).requires_grad_(trainable), loaded.tokenizer
    loaded = load(saved, loaded_base, trainable)
    return loaded.model, loaded.tokenizer


def load_base(
    saved: Saved,
    base: str | None = None,
    quant: str | None = None,
    dtype: str | None = None,
    whole: bool = False,
) -> Base:
    """Load the base of what was saved, with `base_config`.

    Args:
        saved: the adapter, or a whole model.
        base: as for `base_config`.
        quant: as for `base_config`.
        dtype: of its weights; None: as in its run.
        whole: a multimodal base with its towers.

    Raises:
        AdapterError: its weights are not those that the adapter was trained on.
    """
    cfg = base_config(saved, base, quant)
    check_name(saved, base)
    cfg.model.dtype = dtype or cfg.model.dtype
    # without a connection to the Hub this takes half a minute
    with console.status(f"loading {cfg.model.path}"):
        loaded = base_of(cfg, whole)
    if saved.adapter is not None:
        check_base(saved, loaded.revision, base, loaded.saved_as)
    return loaded


def in_floats(base: Base) -> Base:
    """Return the base with float32 weights; those of a quantised base are dequantised."""
    if not is_quantised(base.model):
        return base
    return replace(base, model=dequantise(base.model, torch.float32))


def check_name(saved: Saved, base: str | None) -> None:
    """Refuse a base of another name, before it is loaded, if no record has its hash.

    Raises:
        AdapterError: it has another name.
    """
    if not saved.record.get("base"):
        _check_same_name(saved, base)


def check_base(
    saved: Saved, revision: str | None, base: str | None = None, saved_as: str | None = None
) -> None:
    """Refuse a base of other weights than those that an adapter was trained on.

    A base that was saved quantised and its original have other files: there the name counts.

    Args:
        saved: the adapter.
        revision: the base's commit or hash.
        base: its name or location, if not the one that the adapter names.
        saved_as: how it was saved quantised.

    Raises:
        AdapterError: the run's record has another commit or hash; or the two cannot be compared,
            and the base has another name.
    """
    recorded = saved.record.get("base")
    same_form = base is None or saved_as == saved.record.get("saved_as")
    if not comparable(recorded, revision) or (recorded != revision and not same_form):
        _check_same_name(saved, base)
    elif recorded != revision:
        text = f"was trained on a base of other weights ({recorded}, not {revision})"
        raise AdapterError(f"{saved.folder} {text}")


def _check_same_name(saved: Saved, base: str | None) -> None:
    if base is None or saved.adapter is None or not saved.base:
        return
    name, location = parse_base(base)
    expected = named(saved.base)
    if expected not in (named(name), named(base_config(saved, location, "none").model.path)):
        text = f"was trained on {saved.base}, not on {name}"
        cure = f"if they are the same, give --base {expected}={location}"
        raise AdapterError(f"{saved.folder} {text}; {cure}")


def load(saved: Saved, base: Base, trainable: bool = False, apart: bool = False) -> Loaded:
    """Put what was saved on a base; a whole model is its own base.

    Args:
        saved: what to put on it.
        base: with the weights that it was trained on.
        trainable: whether the adapter's weights take gradients.
        apart: refuse an adapter that changes the base, since others share it.

    Raises:
        AdapterError: it does not fit, its weights are not finite, or its tokenizer has tokens
            without an embedding.
    """
    model = base.model
    if saved.adapter is not None:
        config = read_config(str(saved.folder), model)
        config.inference_mode = not trainable
        model = mount(model, config, str(saved.folder), trainable, apart)
    if not trainable:
        model.eval()
    tokenizer = tokenizer_of(saved, base)
    if missing := missing_embeddings(model, tokenizer):
        cure = "save it with them (peft: save_embedding_layers=True), or with its base's tokenizer"
        if saved.adapter is None:
            cure = "add them with resize_token_embeddings, and save the model again"
        raise AdapterError(f"{saved.folder}: {missing}; {cure}")
    return Loaded(saved.name, model, tokenizer)


def side_by_side(several: list[Saved], base: Base, place: str | None = None) -> list[Loaded]:
    """Put several adapters on one base: each has its own modules, and all share the weights.

    Args:
        several: the adapters.
        base: with the weights that they were trained on.
        place: its name or location, if not the one that they name.

    Raises:
        AdapterError: one does not fit, belongs to another base, or would change it.
    """
    loaded: list[Loaded] = []
    for saved in several:
        check_base(saved, base.revision, place, base.saved_as)
        check_apart(saved)
        shared = replace(base, model=sharing_copy(base.model))
        loaded.append(load(saved, shared, apart=True))
    return loaded


def check_apart(saved: Saved) -> None:
    """Refuse an adapter that changes its base, where the base itself is also needed.

    Raises:
        AdapterError: it carries the base's biases, or starts by rewriting the base's weights.
    """
    rewriting = rewrites_base(saved.adapter or {})
    if saved.bias != NO_BIAS or rewriting:
        reason = f"bias={saved.bias}" if saved.bias != NO_BIAS else rewriting
        text = f"changes the base itself ({reason}); merge it first, then use the merged model"
        raise AdapterError(f"{saved.folder} {text}")


def tokenizer_of(saved: Saved, base: Base) -> Any:
    """Return the tokenizer that was saved with the weights, or the base's."""
    if not (saved.folder / "tokenizer_config.json").is_file():
        return base.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(saved.folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SavedError(f"{saved.folder}: its tokenizer cannot be loaded: {error}") from error
    ensure_pad_token(tokenizer)
    return tokenizer


def merged(model: Any) -> Any:
    """Return the unquantised base of a PeftModel with the adapter merged in.

    Raises:
        AdapterError: the method cannot be merged, or the result is not finite.
    """
    if any(getattr(config, "lora_bias", False) for config in model.peft_config.values()):
        _check_biases(model)
    _untie(model)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        method = model.peft_config[model.active_adapter].peft_type.value
        raise AdapterError(f"{method} cannot be merged: {error}") from error


def _check_biases(model: Any) -> None:
    """Refuse trained biases of layers without a bias: a merged model cannot hold them."""
    for name, module in model.get_base_model().named_modules():
        trained = isinstance(module, LoraLayer) and any(module.lora_bias.values())
        if trained and getattr(module.get_base_layer(), "bias", None) is None:
            text = f"lora_bias=true trained a bias for {name}, which has none in this base"
            raise AdapterError(f"{text}; it cannot be merged, so serve the adapter itself")


def _untie(model: Any) -> None:
    """Untie embeddings if one of the two was adapted, since a merge would change both."""
    base = model.get_base_model()
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    rows = getattr(last, "token_adapter", None)
    if rows is not None and rows.tied_adapter is not None:
        return  # the same trained rows go into both
    if any(isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) for layer in (first, last)):
        untie(base)
