"""A saved adapter put on a base: it fits in every weight, or is refused by name.

peft would only warn of what has no match, and pass on what torch says of the rest.
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

from lora_exp.adapter.untrusted import names_only, read_weights
from lora_exp.errors import AdapterError, LoraExpError

# peft saves both sides of a wholly trained embedding, where it saves embeddings too
ORIGINAL, TRAINED = ".original_module", ".modules_to_save"


def put(model: Any, config: Any, path: str, trainable: bool, apart: bool = False) -> Any:
    """Put a saved adapter on the base that it was trained on.

    Embeddings that the file holds beside the adapter, as peft saves them after more tokens were
    added, become those of the base; a vocabulary of another size is taken from the file.

    Args:
        model: the base.
        config: the adapter's, its patterns replaced by names.
        path: its folder.
        trainable: whether its weights take gradients.
        apart: refuse embeddings that differ from the base's, which others compute with too.

    Raises:
        AdapterError: its weights are missing, not finite, no numbers, or of another base's shape.
    """
    weights = read_weights(path)
    folder = str(Path(path).expanduser())
    if apart:
        check_embeddings(model, config, weights, path)
    _resize(model, weights)
    with fitting(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # AdaLoRA's weights
        made = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)
    check_fit(made, weights, path)
    return made


def add(model: Any, path: str, name: str) -> None:
    """Add a saved adapter to a PeftModel, beside those that it has.

    Raises:
        AdapterError: as `put`, or it holds other embeddings than the base's.
    """
    config, weights = read_config(path, model.get_base_model()), read_weights(path)
    check_embeddings(model.get_base_model(), config, weights, path)
    with fitting(path):
        model.add_adapter(name, config)
        found = peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    lost = [key for key in found.missing_keys if f".{name}." in key]
    if lost or found.unexpected_keys:
        first = [*lost, *found.unexpected_keys][0]
        raise AdapterError(f"{path} does not fit this base: {first} has no match")


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
    held = dict(_embeddings(model, config, weights))
    for key, own in held.items():
        if ORIGINAL in key and own.shape != weights[key].shape:
            continue  # of more tokens than the base has: they get a module of their own
        if own.shape != weights[key].shape or not torch.equal(own, weights[key].to(own)):
            text = "changes the base itself: it holds embeddings that differ from the base's"
            raise AdapterError(f"{path} {text}; merge it alone first, then take the model")
    return set(held)


def _embeddings(
    model: Any, config: Any, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the keys of a file's embeddings, and the base's own; not those that peft trains."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = tuple(f".{name}" for name in getattr(config, "modules_to_save", None) or ())
    for name, module in model.named_modules():
        if not any(module is layer for layer in layers):
            continue
        plain = () if f".{name}".endswith(trained) else ("", ".base_layer")
        for part, end in product((*plain, ORIGINAL), ("weight", "bias")):
            key, own = f"base_model.model.{name}{part}.{end}", getattr(module, end, None)
            if key in weights and own is not None:
                yield key, own


def _resize(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a base as many embeddings as an adapter's file holds, if it holds all of them."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    held = {key: own for key, own in _embeddings(model, None, weights) if key.endswith("weight")}
    needed = [layer.weight for layer in (first, last) if layer is not None]
    sizes = {len(weights[key]) for key in held}
    if all(any(own is weight for own in held.values()) for weight in needed) and len(sizes) == 1:
        (rows,) = sizes
        if rows != len(first.weight):
            model.resize_token_embeddings(rows, mean_resizing=False)


def read_config(path: str, model: Any) -> Any:
    """Read a saved adapter's config for a base, its patterns replaced by names.

    Raises:
        AdapterError: it is none of peft's, or a pattern is none, finds nothing or takes too long.
    """
    with fitting(path):
        config = peft.PeftConfig.from_pretrained(str(Path(path).expanduser()))
    names_only(config, model, path)
    return config


@contextmanager
def fitting(path: str) -> Iterator[None]:
    """Tell of which adapter peft says that it cannot be put on a base.

    Raises:
        AdapterError: with the first of torch's list of sizes, which has a line for each weight.
    """
    try:
        yield
    except (LoraExpError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        said = lines[1] if isinstance(error, RuntimeError) and lines[1:] else lines[0]
        raise AdapterError(f"{path} does not fit this base: {said}") from error


def check_fit(model: Any, saved: Mapping[str, Tensor], path: str) -> None:
    """Refuse an adapter of a base with more layers, or fewer: peft would only warn.

    Args:
        model: with the adapter on it.
        saved: its weights as they were read.
        path: its folder, for errors.

    Raises:
        AdapterError: with the first weight that has no match.
    """
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    base = model.get_base_model()
    embeddings = {key for key, _ in _embeddings(base, None, saved)}
    embeddings |= {key for key in saved if TRAINED in key and key.replace(TRAINED, "") in own}
    if lost := sorted((own - saved.keys()) | (saved.keys() - own - embeddings)):
        text = f"{path} does not fit this base: {len(lost)} of its weights have no match"
        raise AdapterError(f"{text}, the first is {lost[0]}")
