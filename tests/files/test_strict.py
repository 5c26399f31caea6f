"""No file or page holds JSON that only Python reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lora_exp.files.strict import dumps, finite


def test_numbers_that_are_none_become_null() -> None:
    value = {"a": [1.0, math.nan, {"b": (math.inf, -math.inf, "NaN")}], "c": 2, "d": None}
    text = dumps(value, indent=1)
    assert json.loads(text) == {"a": [1.0, None, {"b": [None, None, "NaN"]}], "c": 2, "d": None}
    assert finite(True) is True


def test_what_json_has_no_word_for_is_written_as_asked() -> None:
    assert dumps({"path": Path("a/b")}, default=str) == '{"path": "a/b"}'
