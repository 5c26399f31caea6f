"""Which keys of a config its interpolations refer to: those whose values decide other values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

KEY = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")
# resolvers whose result depends on nothing but their arguments
PURE = re.compile(r"\$\{product:[^${}]*\}")


def references(values: Any) -> frozenset[str] | None:
    """Return the dotted keys that interpolations refer to.

    Args:
        values: of a config, as nested dicts and lists with interpolations as texts.

    Returns:
        None: an interpolation may depend on more than on keys of the config.
    """
    found: set[str] = set()
    for text in _interpolations(values):
        found.update(KEY.findall(text))
        if "${" in PURE.sub("", KEY.sub("", text)):
            return None
    return frozenset(found)


def _interpolations(values: Any) -> Iterator[str]:
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _interpolations(value)
    elif isinstance(values, str) and "${" in values:
        yield values


def referred(keys: Iterable[str], references: Iterable[str]) -> list[str]:
    """Return the keys that are referred to, or that are above or below one that is."""
    above_or_below = [f"{reference}." for reference in references]
    return [
        key
        for key in keys
        if any(f"{key}.".startswith(r) or r.startswith(f"{key}.") for r in above_or_below)
    ]
