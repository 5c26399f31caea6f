"""A saved adapter mounted on a base, or refused with the name of a weight that does not fit.

peft would only warn of weights without a match, and pass on torch's errors for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from lora_exp.adapter.rows import make_room
from lora_exp.adapter.untrusted import read_weights, resolve_patterns
from lora_exp.errors import AdapterError, LoraExpError
from lora_exp.model.experts import quantised_stacks
from lora_exp.model.quantised import quantised_module

# where peft saves embeddings, it saves a wholly trained one twice: as it was, and as trained
ORIGINAL, TRAINED = ".original_module", ".modules_to_save"


def mount(model: Any, config: Any, path: str, trainable: bool, apart: bool = False) -> Any:
    """Mount a saved adapter on the base that it was trained on.

    If the file also has embeddings, as peft saves them after tokens were added, they replace those
    of the base, which is resized to their number.

    Args:
        model: the base.
        config: the adapter's, its patterns replaced by names.
        path: its folder.
        trainable: whether its weights take gradients.
        apart: whether others share the base: embeddings that differ from its own are refused.

    Raises:
        AdapterError: its weights are missing, not finite, no tensors, or of another base's shape;
            or it needs quantised experts or modules in floats.
    """
    weights = read_weights(path)
    _check_in_floats(model, config, path)
    folder = str(Path(path).expanduser())
    if apart:
        check_embeddings(model, config, weights, path)
    _resize(model, weights)
    make_room(model, config, path, apart)
    with fitting(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
        # AdaLoRA's weights, and experts
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        mounted = peft.PeftModel.from_pretrained(
            model, folder, is_trainable=trainable, config=config
        )
    check_fit(mounted, weights, path)
    return mounted


def _check_in_floats(model: Any, config: Any, path: str) -> None:
    """Refuse an adapter of what must be in floats, and is quantised.

    Raises:
        AdapterError: it adapts experts, or holds modules that were trained whole.
    """
    cure = "load the base unquantised (quant=none, --quant none)"
    ends = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
    for name in quantised_stacks(model):
        if f".{name}".endswith(ends):
            text = f"adapts experts, and peft needs {name} in floats; quant.experts=false, or"
            raise AdapterError(f"{path} {text} {cure}")
    if whole := quantised_module(model, getattr(config, "modules_to_save", None) or ()):
        raise AdapterError(f"{path} holds {whole} as it was trained whole, in floats; {cure}")


def mount_beside(model: Any, path: str, name: str) -> None:
    """Mount a saved adapter on a PeftModel, beside its adapters.

    Raises:
        AdapterError: as for `mount`, or its embeddings differ from the base's.
    """
    config, weights = read_config(path, model.get_base_model()), read_weights(path)
    _check_in_floats(model.get_base_model(), config, path)
    check_embeddings(model.get_base_model(), config, weights, path)
    make_room(model.get_base_model(), config, path, apart=True)
    with fitting(path):
        model.add_adapter(name, config)
        loaded = peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in loaded.missing_keys if f".{name}." in key]
    if unmatched := [*missing, *loaded.unexpected_keys]:
        raise AdapterError(f"{path} does not fit this base: {unmatched[0]} has no match")


def check_embeddings(model: Any, config: Any, weights: Mapping[str, Tensor], path: str) -> set[str]:
    """Refuse embeddings in an adapter's file that differ from the base's.

    Args:
        model: the base, with or without adapters.
        config: the adapter's.
        weights: as they were read.
        path: its folder, for errors.

    Returns:
        The keys of the base's own embeddings in the file.

    Raises:
        AdapterError: putting it on the base would change the base.
    """
    embeddings = dict(_embeddings(model, config, weights))
    for key, base_weight in embeddings.items():
        same_shape = base_weight.shape == weights[key].shape
        if ORIGINAL in key and not same_shape:
            continue  # of more tokens than the base has: they get a module of their own
        if not same_shape or not torch.equal(base_weight, weights[key].to(base_weight)):
            text = "changes the base itself: it holds embeddings that differ from the base's"
            raise AdapterError(f"{path} {text}; merge it alone first, then take the model")
    return set(embeddings)


def _embeddings(
    model: Any, config: Any, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the key of each embedding in a file, except trained ones, and the base's own weight."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = tuple(f".{name}" for name in getattr(config, "modules_to_save", None) or ())
    for name, module in model.named_modules():
        if not any(module is layer for layer in layers):
            continue
        plain = () if f".{name}".endswith(trained) else ("", ".base_layer")
        for part, end in product((*plain, ORIGINAL), ("weight", "bias")):
            key, base_weight = f"base_model.model.{name}{part}.{end}", getattr(module, end, None)
            if key in weights and base_weight is not None:
                yield key, base_weight


def _resize(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Resize a base to the number of embeddings in an adapter's file, if it has all of them."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    pairs = _embeddings(model, None, weights)
    embeddings = {key: weight for key, weight in pairs if key.endswith("weight")}
    needed = [layer.weight for layer in (first, last) if layer is not None]
    sizes = {len(weights[key]) for key in embeddings}
    complete = all(any(w is weight for w in embeddings.values()) for weight in needed)
    if complete and len(sizes) == 1:
        (rows,) = sizes
        if rows != len(first.weight):
            model.resize_token_embeddings(rows, mean_resizing=False)


def read_config(path: str, model: Any) -> Any:
    """Read a saved adapter's config for a base, its patterns replaced by names.

    Raises:
        AdapterError: it is not peft's, or a pattern is invalid, matches nothing or is slow.
    """
    with fitting(path):
        config = peft.PeftConfig.from_pretrained(str(Path(path).expanduser()))
    resolve_patterns(config, model, path)
    return config


@contextmanager
def fitting(path: str) -> Iterator[None]:
    """Name the adapter in the error if peft cannot mount it on a base.

    Raises:
        AdapterError: with the first line of torch's list of sizes, which has one for each weight.
    """
    try:
        yield
    except (LoraExpError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = lines[1] if isinstance(error, RuntimeError) and lines[1:] else lines[0]
        raise AdapterError(f"{path} does not fit this base: {reason}") from error


def check_fit(model: Any, saved: Mapping[str, Tensor], path: str) -> None:
    """Refuse an adapter of a base with more layers, or fewer, or weights that peft has not loaded.

    peft would only warn, or not even that.

    Args:
        model: with the adapter on it.
        saved: its weights as they were read.
        path: its folder, for errors.

    Raises:
        AdapterError: with the first weight that has no match.
    """
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = loaded.keys()
    base = model.get_base_model()
    embeddings = {key for key, _ in _embeddings(base, None, saved)}
    embeddings |= {key for key in saved if TRAINED in key and key.replace(TRAINED, "") in expected}
    if unmatched := sorted((expected - saved.keys()) | (saved.keys() - expected - embeddings)):
        text = f"{path} does not fit this base: {len(unmatched)} of its weights have no match"
        raise AdapterError(f"{text}, the first is {unmatched[0]}")
    for key, weight in loaded.items():
        if not torch.equal(weight, saved[key].to(weight)):
            text = f"{path}: peft does not load {key}, which it takes for another weight's name"
            raise AdapterError(f"{text}; train again without it (peft.exclude_modules)")
