"""An override's key and value, split as in Hydra's grammar."""

from __future__ import annotations

import re


def quoted(text: object) -> str:
    """Return a text as a quoted value of Hydra's grammar.

    There a backslash stands for itself, but for backslashes before a quote or the end.
    """
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), str(text))
    return f"'{escaped}'"


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of `key=value`, `+key=value`, `++key=value` or `~key`."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value
