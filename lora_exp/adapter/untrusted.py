"""Files from anywhere: an adapter's patterns become names, its weights are numbers or refused.

peft would run the patterns, however long they take.
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_exp.config.start import WEIGHTS
from lora_exp.errors import AdapterError, LoraExpError

SECONDS = 2.0  # for all names and patterns together
PLAIN = re.compile(r"[\w.\-]+")  # a name, whole or its last parts


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


def read_weights(path: str, finite: bool = True) -> dict[str, Any]:
    """Read a saved adapter's weights; `finite`: refuse such that are not.

    Raises:
        AdapterError: there are none, or they are damaged, not finite or no numbers.
    """
    folder = Path(path).expanduser()
    file = folder / WEIGHTS[0]
    with numbers_only(path):
        try:
            if file.is_file():
                weights: dict[str, Any] = load_file(file)
            else:  # as adapters were saved once
                weights = torch.load(folder / WEIGHTS[1], "cpu", weights_only=True)
        except (SafetensorError, OSError, EOFError, RuntimeError) as error:
            raise AdapterError(f"{path}: its weights are damaged: {error}") from error
    named = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
    if not named or not all(map(torch.is_tensor, weights.values())):
        raise AdapterError(f"{path}: its weights are no tensors with names")
    if not weights:
        raise AdapterError(f"{path} holds no weights")
    bad = sorted(key for key, value in weights.items() if not value.float().isfinite().all())
    if bad and finite:
        raise AdapterError(f"{path}: {len(bad)} weights are not finite, the first is {bad[0]}")
    return weights


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
    search = Search([name for name, _ in model.named_modules() if name], path)
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        wanted = getattr(config, key, None)
        if isinstance(wanted, str) and wanted != "all-linear":
            setattr(config, key, search.found(wanted, key))
    for key in ("target_modules", "modules_to_save", "layers_pattern"):
        listed = getattr(config, key, None) or ()
        for name in [listed] if isinstance(listed, str) else listed:
            if not PLAIN.fullmatch(name):
                raise AdapterError(f"{path}: {key}: {name!r} is no name of a module")
    if config.peft_type == "ADALORA":
        return  # its rank_pattern names weights, which it looks up
    targets = {f".{name}" for name in config.target_modules or ()} if _targeted(config) else set()
    adapted = [name for name in search.names if any(f".{name}".endswith(end) for end in targets)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        named: dict[str, Any] = {}
        for pattern, value in patterns.items():  # peft takes the first that fits
            for name in search.found(rf"(.*\.)?({pattern})", key, optional=True):
                if name in adapted:
                    named.setdefault(name, value)
        if patterns:
            setattr(config, key, named)


def _targeted(config: Any) -> bool:
    return isinstance(getattr(config, "target_modules", None), list | set | tuple)


class Search:
    """Looks for patterns among the names of a base, all of them in `SECONDS`."""

    def __init__(self, names: list[str], path: str) -> None:
        self.names, self.path = names, path
        self.until = time.perf_counter() + SECONDS

    def found(self, pattern: str, key: str, optional: bool = False) -> list[str]:
        """Return the names that a pattern fits whole, sorted.

        Raises:
            AdapterError: it is no pattern, takes too long, or fits none that it must.
        """
        what = f"{self.path}: {key}: {pattern!r}"
        try:
            compiled = regex.compile(pattern)
            names = [name for name in self.names if self._fits(compiled, name)]
        except regex.error as error:
            raise AdapterError(f"{what} is no pattern: {error}") from error
        except TimeoutError as error:
            text = f"{what} does not end within {SECONDS:g} s; list the modules instead"
            raise AdapterError(text) from error
        if not names and not optional:
            raise AdapterError(f"{what} finds no module of this base")
        return sorted(names)

    def _fits(self, compiled: Any, name: str) -> bool:
        left = self.until - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        return compiled.fullmatch(name, timeout=left) is not None
