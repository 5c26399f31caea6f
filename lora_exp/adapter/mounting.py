"""A saved adapter put on a base: it fits in every weight, or is refused by name.

peft would only warn of what has no match, and pass on what torch says of the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch

from lora_exp.adapter.untrusted import names_only, read_weights
from lora_exp.errors import AdapterError, LoraExpError


def put(model: Any, config: Any, path: str, trainable: bool) -> Any:
    """Put a saved adapter on the base that it was trained on.

    Args:
        model: the base.
        config: the adapter's, its patterns replaced by names.
        path: its folder.
        trainable: whether its weights take gradients.

    Raises:
        AdapterError: its weights are missing, not finite, no numbers, or of another base's shape.
    """
    weights = read_weights(path)
    folder = str(Path(path).expanduser())
    with fitting(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # AdaLoRA's weights
        made = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)
    check_fit(made, weights, path)
    return made


def add(model: Any, path: str, name: str) -> None:
    """Add a saved adapter to a PeftModel, beside those that it has.

    Raises:
        AdapterError: as `put`.
    """
    config, weights = read_config(path, model.get_base_model()), read_weights(path)
    with fitting(path):
        model.add_adapter(name, config)
        found = peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    lost = [key for key in found.missing_keys if f".{name}." in key]
    if lost or found.unexpected_keys:
        first = [*lost, *found.unexpected_keys][0]
        raise AdapterError(f"{path} does not fit this base: {first} has no match")


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


def check_fit(model: Any, saved: dict[str, Any], path: str) -> None:
    """Refuse an adapter of a base with more layers, or fewer: peft would only warn.

    Args:
        model: with the adapter on it.
        saved: its weights as they were read.
        path: its folder, for errors.

    Raises:
        AdapterError: with the first weight that has no match.
    """
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {key for key in saved if "embed" not in key}
    if lost := sorted({key for key in own if "embed" not in key} ^ kept):
        text = f"{path} does not fit this base: {len(lost)} of its weights have no match"
        raise AdapterError(f"{text}, the first is {lost[0]}")
