"""Patterns of an adapter from anywhere become names, in time or not at all."""

from __future__ import annotations

import time
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from lora_exp.errors import AdapterError
from lora_exp.foreign import names_only


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # peft's word for no_such
def test_patterns_become_the_names_that_peft_would_have_found(fresh_base: Any) -> None:
    config = LoraConfig(
        target_modules=r".*\.layers\.[01]\.self_attn\.[qv]_proj",
        rank_pattern={r"layers\.1\.self_attn\..*": 3, "q_proj": 5, "no_such": 7},
    )
    theirs = get_peft_model(fresh_base.model, config)
    found = set(theirs.targeted_module_names)
    theirs = theirs.unload()
    names_only(config, theirs, "a/adapter")
    assert set(config.target_modules) == found
    ours = get_peft_model(theirs, config)
    ranks = {name: m.r["default"] for name, m in ours.named_modules() if hasattr(m, "lora_A")}
    assert {rank for name, rank in ranks.items() if "layers.1." in name} == {3}
    assert ranks["base_model.model.model.layers.0.self_attn.q_proj"] == 5
    assert ranks["base_model.model.model.layers.0.self_attn.v_proj"] == 8


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"target_modules": r"(?:.|.|.)*[^\w.]\w"},
            r"a/b: target_modules: .* does not end within 2 s",
        ),
        (
            {"rank_pattern": {r"(?:.|.|.)*[^\w.]\w": 4}},
            "a/b: rank_pattern: .* does not end within 2 s",
        ),
        ({"target_modules": "q_proj["}, "is no pattern"),
        ({"target_modules": "nothing"}, "finds no module"),
        ({"target_modules": ["(a+)+b"]}, "is no name of a module"),
        ({"layers_pattern": "(a+)+b", "layers_to_transform": [0]}, "is no name of a module"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "would import what it names"),
    ],
)
def test_what_hangs_or_imports_is_refused(base: Any, said: dict[str, Any], message: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **said})
    began = time.perf_counter()
    with pytest.raises(AdapterError, match=message):
        names_only(config, base.model, "a/b")
    assert time.perf_counter() - began < 5
