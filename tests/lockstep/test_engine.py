"""Each engine has what `Cluster` uses, and its section in the launcher's config."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from hydra_plugins.lockstep_launcher._core import DEFAULTS, ENGINES
from lora_exp.lockstep.engine import Engine

METHODS = [name for name, _ in inspect.getmembers(Engine, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_the_protocols_attributes_and_methods(name: str) -> None:
    engine: Any = ENGINES[name]
    assert engine.name == name
    assert engine.unit.endswith(("job", "task"))
    assert engine.limit > 0
    assert len(METHODS) == 5
    for method in METHODS:
        expected = inspect.signature(getattr(Engine, method)).parameters
        assert inspect.signature(getattr(engine, method)).parameters == expected
    assert "retries" in DEFAULTS[name]
