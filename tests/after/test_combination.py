"""Several LoRAs combined into one: their weighted sum, and peft's other methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_exp.after.loading import load_adapter
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.errors import AdapterError

Trained = Callable[..., Path]


@pytest.mark.parametrize("methods", [("lora", "lora"), ("rslora", "lora"), ("rslora", "rslora")])
def test_two_adapters_become_the_weighted_sum_of_their_updates(
    trained: Trained, tmp_path: Path, methods: tuple[str, str]
) -> None:
    runs = [trained(f"peft={methods[0]}"), trained(f"peft={methods[1]}", "seed=7", "peft.r=4")]
    merged = merge(runs, tmp_path / "merged", weights=[0.75, 0.25])
    merged_model, _ = load_adapter(merged)
    deltas = []
    for run in runs:
        adapted, _ = load_adapter(run, merge=True)
        deltas.append(dict(adapted.named_parameters()))
    plain, _ = load_adapter("lora_exp/assets/tiny")
    for name, weight in plain.named_parameters():
        expected = weight + 0.75 * (deltas[0][name] - weight) + 0.25 * (deltas[1][name] - weight)
        assert torch.allclose(dict(merged_model.named_parameters())[name], expected, atol=1e-6)
    record = json.loads((merged / "merge.json").read_text())
    assert record["method"] == "cat"
    assert record["weights"] == [0.75, 0.25]
    assert len(record["adapters"]) == 2


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "svd"])
def test_combining_by_each_of_pefts_methods_is_deterministic(
    trained: Trained, tmp_path: Path, method: str
) -> None:
    runs = [trained("peft=lora"), trained("peft=lora", "seed=7")]
    merged = [merge(runs, tmp_path / f"{i}", method=method) for i in range(2)]
    first, second = (load_file(folder / "model.safetensors") for folder in merged)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert prove(merged[0], runs).holds
    with pytest.raises(AdapterError, match=r"was merged from r16-all_linear.*, .*: give --adapter"):
        prove(merged[0], runs[:1])
    with pytest.raises(AdapterError, match="give --adapter for each"):
        prove(merged[0], runs[::-1])


def test_density_changes_the_result_and_is_recorded(trained: Trained, tmp_path: Path) -> None:
    runs = [trained("peft=lora"), trained("peft=lora", "seed=7")]
    merged = [
        merge(runs, tmp_path / f"{density}", method="ties", density=density)
        for density in (0.1, 0.9)
    ]
    first, second = (load_file(folder / "model.safetensors") for folder in merged)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert prove(merged[0], runs).holds  # with the density in its record
