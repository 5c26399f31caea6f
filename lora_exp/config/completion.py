"""Shell completion of `lora-exp run`: groups, their options, keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hydra
from omegaconf import OmegaConf

from lora_exp.config.door import CONF

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())


def completions(incomplete: str, before: list[str]) -> list[str]:
    """Return the completions of a word.

    Args:
        incomplete: the word as far as it is typed.
        before: the words before it; if a shell splits words at `=`, the key and the `=` are there.
    """
    if incomplete == "=" and before:
        before, incomplete = [*before, "="], ""
    if before[-1:] == ["="] and len(before) > 1:
        return [o for o in _options(before[-2]) if o.startswith(incomplete)]
    group, equals, typed = incomplete.partition("=")
    if equals:
        return [f"{group}={o}" for o in _options(group) if o.startswith(typed)]
    signs = incomplete[: len(incomplete) - len(incomplete.lstrip("+~"))]
    words = [f"{word}=" for word in (*GROUPS, *_keys())]
    return [signs + word for word in words if word.startswith(incomplete.lstrip("+~"))]


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _keys() -> list[str]:
    """Return every key of the default config."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose("config"))
    return sorted(set(_leaves(values)) - set(GROUPS))


def _leaves(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}"
