"""JSON that every reader takes: null where a number is NaN or infinite."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Return `json.dumps` of a value, with null for NaN and infinite numbers."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rare, and to look at each number takes as long as to write them all
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Return a value with None for each number in it that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {finite(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
