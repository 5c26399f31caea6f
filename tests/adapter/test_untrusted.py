"""Untrusted adapters: patterns become names within a time limit, and weights are checked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_exp.adapter.untrusted import Search, read_weights, resolve_patterns
from lora_exp.errors import AdapterError

Trained = Callable[..., Path]


def test_weights_that_are_damaged_or_not_finite_are_refused(
    trained: Trained, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained("peft=lora") / "adapter", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    assert read_weights(str(folder)).keys() == weights.keys()
    first = min(weights)
    save_file(weights | {first: torch.full_like(weights[first], float("inf"))}, file)
    with pytest.raises(AdapterError, match=f"1 weights are not finite, the first is {first}"):
        read_weights(str(folder))
    assert read_weights(str(folder), finite=False)
    file.write_bytes(b"")
    with pytest.raises(AdapterError, match="its weights are damaged"):
        read_weights(str(folder))
    file.unlink()
    torch.save(weights, folder / "adapter_model.bin")
    assert all(torch.equal(value, weights[key]) for key, value in read_weights(str(folder)).items())
    for content in ({first: 3.0}, [weights[first]], weights[first], {1: weights[first]}, []):
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(AdapterError, match="no tensors with names"):
            read_weights(str(folder))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # no_such matches nothing
def test_patterns_become_the_names_that_peft_matches(fresh_base: Any) -> None:
    config = LoraConfig(
        target_modules=r".*\.layers\.[01]\.self_attn\.[qv]_proj",
        rank_pattern={r"layers\.1\.self_attn\..*": 3, "q_proj": 5, "no_such": 7},
    )
    peft_model = get_peft_model(fresh_base.model, config)
    expected = set(peft_model.targeted_module_names)
    peft_model = peft_model.unload()
    resolve_patterns(config, peft_model, "a/adapter")
    assert set(config.target_modules) == expected
    model = get_peft_model(peft_model, config)
    ranks = {
        name: module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {rank for name, rank in ranks.items() if "layers.1." in name} == {3}
    assert ranks["base_model.model.model.layers.0.self_attn.q_proj"] == 5
    assert ranks["base_model.model.model.layers.0.self_attn.v_proj"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
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
def test_a_config_that_would_hang_or_import_code_is_refused(
    base: Any, settings: dict[str, Any], message: str
) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **settings})
    start = time.perf_counter()
    with pytest.raises(AdapterError, match=message):
        resolve_patterns(config, base.model, "a/b")
    assert time.perf_counter() - start < 5


def test_a_search_that_waits_for_the_processor_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_exp.adapter.untrusted.SECONDS", 0.1)
    search = Search(["layers.0.q_proj"], "a/b")
    time.sleep(0.3)
    assert search.matches(r".*q_proj", "target_modules") == ["layers.0.q_proj"]
