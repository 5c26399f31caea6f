"""Adapters from untrusted sources: patterns become names, and weights may hold no code.

peft would run the patterns, however long they take.
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_exp.config.start import WEIGHTS
from lora_exp.errors import AdapterError, LoraExpError

SECONDS = 2.0  # for all names and patterns together, of the processor's time
PLAIN = re.compile(r"[\w.\-]+")  # a name, whole or its last parts


@contextmanager
def numbers_only(
    path: str | None, error_class: type[LoraExpError] = AdapterError
) -> Iterator[None]:
    """Name the folder in the error if torch refuses to load a pickle.

    Raises:
        LoraExpError: an `error_class`, if torch refuses.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        text = f"{path} holds code where numbers belong, or is damaged; it is not loaded"
        raise error_class(f"{text} ({str(error).splitlines()[0]})") from error


def read_weights(path: str, finite: bool = True) -> dict[str, Any]:
    """Read a saved adapter's weights; `finite`: refuse NaN and infinite ones.

    Raises:
        AdapterError: there are none, or they are damaged, not finite or no tensors.
    """
    folder = Path(path).expanduser()
    file = folder / WEIGHTS[0]
    with numbers_only(path):
        try:
            if file.is_file():
                weights: dict[str, Any] = load_file(file)
            else:  # older versions of peft save pickles
                weights = torch.load(folder / WEIGHTS[1], "cpu", weights_only=True)
        except (SafetensorError, OSError, EOFError, RuntimeError) as error:
            raise AdapterError(f"{path}: its weights are damaged: {error}") from error
    has_names = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
    if not has_names or not all(map(torch.is_tensor, weights.values())):
        raise AdapterError(f"{path}: its weights are no tensors with names")
    if not weights:
        raise AdapterError(f"{path} holds no weights")
    bad = sorted(key for key, value in weights.items() if not value.float().isfinite().all())
    if bad and finite:
        raise AdapterError(f"{path}: {len(bad)} weights are not finite, the first is {bad[0]}")
    return weights


def resolve_patterns(config: Any, model: Any, path: str) -> None:
    """Replace a config's regular expressions by the module names of a base that they match.

    Args:
        config: a saved adapter's, as peft reads it; changed in place.
        model: the base.
        path: the adapter's folder, for errors.

    Raises:
        AdapterError: a pattern is invalid, matches nothing or is slow, or the config names code.
    """
    if getattr(config, "megatron_config", None) is not None:
        raise AdapterError(f"{path}: megatron_config would import what it names; not allowed")
    search = Search([name for name, _ in model.named_modules() if name], path)
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        pattern = getattr(config, key, None)
        if isinstance(pattern, str) and pattern != "all-linear":
            setattr(config, key, search.matches(pattern, key))
    for key in ("target_modules", "target_parameters", "modules_to_save", "layers_pattern"):
        names = getattr(config, key, None) or ()
        for name in [names] if isinstance(names, str) else names:
            if not PLAIN.fullmatch(name):
                raise AdapterError(f"{path}: {key}: {name!r} is no name of a module")
    _check_token_indices(config, path)
    if config.peft_type == "ADALORA":
        return  # its rank_pattern has names of weights, no patterns
    search.names += [name for name, _ in model.named_parameters()]
    ends = tuple(f".{name}" for name in _listed_targets(config))
    adapted = {name for name in search.names if f".{name}".endswith(ends)}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        values: dict[str, Any] = {}  # module's name -> its rank or alpha
        for pattern, value in patterns.items():  # peft takes the first that matches
            for name in search.matches(rf"(.*\.)?({pattern})", key, optional=True):
                if name in adapted:
                    values.setdefault(name, value)
        if patterns:
            setattr(config, key, values)


def _check_token_indices(config: Any, path: str) -> None:
    """Refuse `trainable_token_indices` that are no lists of numbers.

    Raises:
        AdapterError: they are not.
    """
    indices = getattr(config, "trainable_token_indices", None) or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise AdapterError(f"{path}: trainable_token_indices: {ids!r} is no list of numbers")


def _listed_targets(config: Any) -> Iterable[str]:
    for key in ("target_modules", "target_parameters"):
        targets = getattr(config, key, None)
        yield from targets if isinstance(targets, list | set | tuple) else ()


class Search:
    """Matches patterns with the module names of a base, all together within `SECONDS`."""

    def __init__(self, names: list[str], path: str) -> None:
        self.names, self.path = names, path
        self.deadline = time.process_time() + SECONDS

    def matches(self, pattern: str, key: str, optional: bool = False) -> list[str]:
        """Return the names that a pattern matches as a whole, sorted.

        Raises:
            AdapterError: it is no pattern, takes too long, or matches none and is not optional.
        """
        what = f"{self.path}: {key}: {pattern!r}"
        try:
            compiled = regex.compile(pattern)
            names = [name for name in self.names if self._matches(compiled, name)]
        except regex.error as error:
            raise AdapterError(f"{what} is no pattern: {error}") from error
        except TimeoutError as error:
            text = f"{what} does not end within {SECONDS:g} s; list the modules instead"
            raise AdapterError(text) from error
        if not names and not optional:
            raise AdapterError(f"{what} finds no module of this base")
        return sorted(names)

    def _matches(self, compiled: Any, name: str) -> bool:
        remaining = self.deadline - time.process_time()
        if remaining <= 0:
            raise TimeoutError
        return compiled.fullmatch(name, timeout=remaining) is not None
