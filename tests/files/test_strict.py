"""Files and pages contain only strict JSON, without NaN or Infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lora_exp.files.strict import dumps, finite


@pytest.mark.parametrize("options", [{}, {"indent": 1}])  # json has an encoder for each
def test_nan_and_infinity_become_null(options: dict[str, Any]) -> None:
    value = {"a": [1.0, math.nan, {"b": (math.inf, -math.inf, "NaN")}], "c": 2, "d": None}
    text = dumps(value, **options)
    assert json.loads(text) == {"a": [1.0, None, {"b": [None, None, "NaN"]}], "c": 2, "d": None}
    assert finite(True) is True


def test_values_that_json_cannot_express_use_the_default_function() -> None:
    assert dumps({"path": Path("a/b")}, default=str) == '{"path": "a/b"}'
