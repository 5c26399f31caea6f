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
from torch import nn
from transformers import AutoTokenizer

from lora_exp.adapter.mounting import put, read_config
from lora_exp.after.saved import Saved, base_config, claim, find
from lora_exp.config.initialization import rewrites_base
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.revision import comparable, named
from lora_exp.model.loading import Base, base_of, dequantise, sharing_copy
from lora_exp.model.precision import autocast, is_quantised
from lora_exp.model.special_tokens import ensure_pad_token
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
        """Compute without gradients, in the precision that runs on such a base train in."""
        with torch.no_grad(), autocast(self.model):
            yield


def load_adapter(
    path: str | Path,
    merge: bool = False,
    quant: str | None = None,
    base: str | None = None,
    trainable: bool = False,
) -> tuple[Any, Any]:
    """Load what a run saved, on its base.

    Args:
        path: an adapter, a run, a checkpoint or a whole model.
        merge: true: return the base with the adapter merged in; a quantised base is dequantised.
        quant: `nf4`, `fp4`, `int8` or `none`; None: as its run held the base.
        base: where the base lies, if not where the adapter says; `NAME=PLACE` if its name there is
            another.
        trainable: true: the adapter's weights take gradients, or all of a merged model's.

    Returns:
        The model, a PeftModel unless it was merged or is whole, and its tokenizer.

    Raises:
        SavedError: there is nothing to load.
        AdapterError: it does not belong to this base.
        ConfigError: the base cannot be loaded.
    """
    quiet()
    saved = find(path)
    found = load_base(saved, base, quant)
    if merge and saved.adapter is not None:
        loaded = load(saved, in_floats(found))
        return merged(loaded.model).train(trainable).requires_grad_(trainable), loaded.tokenizer
    loaded = load(saved, found, trainable)
    return loaded.model, loaded.tokenizer


def load_base(
    saved: Saved, base: str | None = None, quant: str | None = None, dtype: str | None = None
) -> Base:
    """Load the base of what was saved, as `base_config` says; `dtype` None: as its run did.

    Raises:
        AdapterError: it has other weights than the one that the adapter was trained on.
    """
    cfg = base_config(saved, base, quant)
    check_name(saved, base)
    cfg.model.dtype = dtype or cfg.model.dtype
    with console.status(f"loading {cfg.model.path}"):  # a Hub out of reach takes half a minute
        found = base_of(cfg)
    if saved.adapter is not None:
        check_base(saved, found.revision, base)
    return found


def in_floats(base: Base) -> Base:
    """Return a base as what was trained on it saw it: a quantised one's weights as float32."""
    if not is_quantised(base.model):
        return base
    return replace(base, model=dequantise(base.model, torch.float32))


def check_name(saved: Saved, base: str | None) -> None:
    """Refuse a base of another name, before it is loaded, where no record tells its weights.

    Raises:
        AdapterError: it has another name.
    """
    if not saved.record.get("base"):
        _check_called(saved, base)


def check_base(saved: Saved, revision: str | None, base: str | None = None) -> None:
    """Refuse a base of other weights than those that an adapter was trained on.

    Args:
        saved: the adapter.
        revision: the base's commit or hash.
        base: what it is called, if not as the adapter says.

    Raises:
        AdapterError: the run's record knows another commit or hash; or the two cannot be compared,
            and it has another name.
    """
    known = saved.record.get("base")
    if not comparable(known, revision):
        _check_called(saved, base)
    elif known != revision:
        text = f"was trained on a base of other weights ({known}, not {revision})"
        raise AdapterError(f"{saved.folder} {text}")


def _check_called(saved: Saved, base: str | None) -> None:
    if base is None or saved.adapter is None or not saved.base:
        return
    name, place = claim(base)
    known = named(saved.base)
    if known not in (named(name), named(base_config(saved, place, "none").model.path)):
        text = f"was trained on {saved.base}, not on {name}"
        raise AdapterError(f"{saved.folder} {text}; if it is the same: --base {known}={place}")


def load(saved: Saved, base: Base, trainable: bool = False, apart: bool = False) -> Loaded:
    """Put what was saved on a base; a whole model is its own.

    Args:
        saved: what to put on it.
        base: whose weights it was trained on.
        trainable: whether the adapter's weights take gradients.
        apart: refuse an adapter that changes the base, which others compute with too.

    Raises:
        AdapterError: it does not fit, its weights are not finite, or its tokenizer has tokens
            without an embedding.
    """
    model = base.model
    if saved.adapter is not None:
        config = read_config(str(saved.folder), model)
        config.inference_mode = not trainable
        model = put(model, config, str(saved.folder), trainable, apart)
    if not trainable:
        model.eval()
    tokenizer = tokenizer_of(saved, base)
    if lost := missing_embeddings(model, tokenizer):
        cure = "save it with them (peft: save_embedding_layers=True), or with its base's tokenizer"
        if saved.adapter is None:
            cure = "add them with resize_token_embeddings, and save the model again"
        raise AdapterError(f"{saved.folder}: {lost}; {cure}")
    return Loaded(saved.name, model, tokenizer)


def side_by_side(several: list[Saved], base: Base) -> list[Loaded]:
    """Put several adapters on one base: each has a tree of modules, all share its weights.

    Raises:
        AdapterError: one does not fit, belongs to another base, or would change it.
    """
    loaded: list[Loaded] = []
    for saved in several:
        check_base(saved, base.revision)
        check_apart(saved)
        own = replace(base, model=sharing_copy(base.model))
        loaded.append(load(saved, own, apart=True))
    return loaded


def check_apart(saved: Saved) -> None:
    """Refuse an adapter that changes its base, where the base is needed beside it.

    Raises:
        AdapterError: it carries the base's biases, or starts by rewriting the base's weights.
    """
    config = saved.adapter or {}
    rewriting, bias = rewrites_base(config), config.get("bias", "none")
    if bias != "none" or rewriting:
        why = f"bias={bias}" if bias != "none" else rewriting
        text = (
            f"{saved.folder} changes the base itself ({why}); merge it first, then take the model"
        )
        raise AdapterError(text)


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
        kind = model.peft_config[model.active_adapter].peft_type.value
        raise AdapterError(f"{kind} cannot be merged: {error}") from error


def _check_biases(model: Any) -> None:
    """Refuse trained biases of layers that have none: a merged model has no place for them."""
    for name, module in model.get_base_model().named_modules():
        trained = isinstance(module, LoraLayer) and any(module.lora_bias.values())
        if trained and getattr(module.get_base_layer(), "bias", None) is None:
            text = f"lora_bias=true trained a bias for {name}, which has none in this base"
            raise AdapterError(f"{text}: it cannot be merged, serve the adapter itself")


def _untie(model: Any) -> None:
    """Part tied embeddings if one of the two was adapted: a merge would change the other too."""
    base = model.get_base_model()
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    if last is None or not base.config.tie_word_embeddings:
        return
    if any(isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper) for each in (first, last)):
        plain = getattr(last, "base_layer", getattr(last, "original_module", last))
        plain.weight = nn.Parameter(plain.weight.detach().clone())
        base.config.tie_word_embeddings = False
