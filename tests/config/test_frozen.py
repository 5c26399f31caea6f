"""A settled config is made of plain values, and cannot be changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from lora_exp.config.frozen import frozen


def test_a_config_that_is_made_from_an_earlier_ones_copy_has_the_types_of_its_own_values() -> None:
    many: list[dict[str, Any]] = [
        {"a": 1, "b": {"c": [1, None], "d": ""}, "e": {}},
        {"a": True, "b": {"c": [1.0, "x"], "d": None}, "e": {}},
        {"a": 1.0, "b": {"c": ["${x}", 2], "d": math.nan}, "e": {}},
        {"a": 1, "b": {"c": [1], "d": "1"}, "e": {}},
        {"a": 1, "b": {"c": [1, None], "d": ""}, "e": []},
    ]
    for values in many * 2:
        cfg = frozen(values)
        created = OmegaConf.create(values)
        assert repr(OmegaConf.to_container(cfg)) == repr(OmegaConf.to_container(created))
        assert OmegaConf.is_interpolation(cfg.b.c, 0) == OmegaConf.is_interpolation(created.b.c, 0)
        assert cfg.b._get_full_key("c") == "b.c"
        with pytest.raises(ReadonlyConfigError):
            cfg.b.d = 2
    many[0]["b"]["c"].append(3)
    assert frozen(many[1]).b.c == [1.0, "x"]
