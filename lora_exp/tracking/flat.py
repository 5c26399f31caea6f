"""Nested configs as flat names and plain values, for trackers that take no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("prompt", "task", "expected", "before", "after")  # of a table of samples


def flat(values: Mapping[str, Any], key: str = "") -> dict[str, bool | int | float | str]:
    """Return a nested config by dotted names, `peft.r`; numbers stay numbers, null is left out."""
    pairs: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        full_key = f"{key}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            pairs |= flat(value, full_key)
        elif isinstance(value, bool | int | float):
            pairs[full_key] = value
        elif value is not None:
            pairs[full_key] = str(value)
    return pairs


def as_markdown(samples: list[dict[str, Any]]) -> str:
    """Return samples as a table of Markdown, in which their text cannot leave its cell."""
    lines = ["|".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    for sample in samples:
        cells = (str(sample.get(column) or "") for column in COLUMNS)
        escaped = (c.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|") for c in cells)
        lines.append("|".join(" ".join(cell.split()) for cell in escaped))
    return "\n".join(f"|{line}|" for line in lines)
