"""An override's key and value, split as in Hydra's grammar."""

from __future__ import annotations


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of `key=value`, `+key=value`, `++key=value` or `~key`."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value
