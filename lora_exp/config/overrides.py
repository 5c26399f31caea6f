"""An override's key and value, as Hydra's grammar parts them."""

from __future__ import annotations


def parted(override: str) -> tuple[str, str]:
    """Return the key and the value of `key=value`, `+key=value`, `++key=value` or `~key`."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value
