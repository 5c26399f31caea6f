"""Files from anywhere: an adapter's patterns become names, its weights are numbers or refused.

peft would run the patterns, however long they take.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import regex

from lora_exp.errors import AdapterError, LoraExpError

SECONDS = 2.0  # for all names together


@contextmanager
def numbers_only(path: str | None, kind: type[LoraExpError] = AdapterError) -> Iterator[None]:
    """Say of which folder torch refuses to load a pickle.

    Raises:
        LoraExpError: of the kind given.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        text = f"{path} holds code where numbers belong, or is damaged; it is not loaded"
        raise kind(f"{text} ({str(error).splitlines()[0]})") from error


def names_only(config: Any, model: Any, path: str) -> None:
    """Replace a config's regular expressions by the names that they find in a base.

    Args:
        config: a saved adapter's, as peft reads it; changed in place.
        model: the base.
        path: the adapter's folder, for errors.

    Raises:
        AdapterError: a pattern is none, finds nothing or takes too long, or the config names code.
    """
    if getattr(config, "megatron_config", None) is not None:
        raise AdapterError(f"{path}: megatron_config would import what it names; not allowed")
    names = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(config, key, None)
        if isinstance(pattern, str) and pattern != "all-linear":
            setattr(config, key, _found(pattern, names, f"{path}: {key}"))
    targets = {f".{name}" for name in getattr(config, "target_modules", None) or ()}
    adapted = [name for name in names if any(f".{name}".endswith(end) for end in targets)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        if patterns:
            found = {
                name: value
                for pattern, value in patterns.items()
                for name in _found(rf"(.*\.)?({pattern})", adapted, f"{path}: {key}")
            }
            setattr(config, key, found)


def _found(pattern: str, names: list[str], what: str) -> list[str]:
    try:
        compiled = regex.compile(pattern)
        found = [name for name in names if compiled.fullmatch(name, timeout=SECONDS)]
    except regex.error as error:
        raise AdapterError(f"{what}: {pattern!r} is no pattern: {error}") from error
    except TimeoutError as error:
        text = f"{what}: {pattern!r} does not end within {SECONDS:g} s; list the modules instead"
        raise AdapterError(text) from error
    if not found:
        raise AdapterError(f"{what}: {pattern!r} finds no module of this base")
    return sorted(found)
