"""The weighted sum that merges are compared with equals peft's, and broken merges are rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.after.saved import find
from lora_exp.after.weighted_sum import WeightedSum
from lora_exp.errors import AdapterError

TINY = "lora_exp/assets/tiny"
PARTS: list[dict[str, Any]] = [
    {"layers_to_transform": [0, 3], "layers_pattern": "layers"},
    {"layers_to_transform": 2},
    {"exclude_modules": ["layers.1.self_attn.q_proj", "down_proj"]},
    {"exclude_modules": r".*\.[02]\.self_attn\..*"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    {"target_modules": r".*layers\.[13]\.mlp\.down_proj"},
    {"use_rslora": True, "r": 3, "lora_alpha": 5},
    {"target_modules": ["embed_tokens", "o_proj"]},
]


def load_plain(path: str = TINY) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def save_adapter(folder: Path, seed: int, path: str = TINY, **changes: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    peft.get_peft_model(load_plain(path), config).save_pretrained(
        folder, save_embedding_layers=False
    )
    return folder


def update_of(folder: Path, path: str = TINY) -> dict[str, Tensor]:
    """Return what an adapter adds to each weight, computed by peft."""
    before = load_plain(path).double()
    start = {name: value.clone() for name, value in before.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(load_plain(path), str(folder)).double()
    adapted.get_base_model().config.tie_word_embeddings = False
    head = adapted.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it may be tied
    after = adapted.merge_and_unload().state_dict()
    return {name: after[name] - start[name] for name in start}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(part))
def test_adapters_of_different_layers_become_the_sum_of_their_updates(
    tmp_path: Path, part: dict[str, Any]
) -> None:
    first, second = (
        save_adapter(tmp_path / "first", 1, **part),
        save_adapter(tmp_path / "second", 2),
    )
    updates = [update_of(first), update_of(second)]
    start = load_plain().state_dict()
    for order in ((0, 1), (1, 0)):
        folders = [(first, second)[i] for i in order]
        out = tmp_path / f"merged{order[0]}"
        merge(folders, out, base=TINY, weights=[0.5, -2.0])
        weights = load_plain(str(out)).state_dict()
        for name in start:
            first_update, second_update = (updates[i][name] for i in order)
            expected = start[name] + 0.5 * first_update - 2.0 * second_update
            assert torch.allclose(weights[name].double(), expected, atol=1e-5), name
    assert prove(out, folders, base=TINY, max_new_tokens=4).holds


@pytest.mark.parametrize("method", ["ties", "svd", "linear", "dare_linear"])
def test_a_layer_adapted_only_by_the_second_is_merged_by_every_method(
    tmp_path: Path, method: str
) -> None:
    first = save_adapter(tmp_path / "first", 1, layers_to_transform=[1])
    second = save_adapter(tmp_path / "second", 2)
    model = load_plain(str(merge([first, second], tmp_path / "out", base=TINY, method=method)))
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], load_plain().state_dict()[name])


def test_a_layer_that_one_adapter_changes_gets_only_its_update(tmp_path: Path) -> None:
    folders = [
        save_adapter(tmp_path / name, seed, target_modules=[name])
        for seed, name in enumerate(("q_proj", "up_proj", "o_proj"))
    ]
    weights = load_plain(str(merge(folders, tmp_path / "out", base=TINY))).state_dict()
    start, updates = load_plain().state_dict(), [update_of(folder) for folder in folders]
    for name in start:
        expected = start[name] + sum(update[name] for update in updates)
        assert torch.allclose(weights[name].double(), expected, atol=1e-5)


Weights = dict[str, Tensor]
DOWN = "model.layers.2.mlp.down_proj.weight"


def _add(weights: Weights, update: Weights, weight: float, only: Iterable[str] = ()) -> Weights:
    keys = list(only) or list(update)
    return weights | {key: weights[key] + weight * update[key].float() for key in keys}


BREAKS: dict[str, Callable[[Weights, Weights, Weights], Weights]] = {
    "the second is left out": lambda weights, _, second: _add(weights, second, -0.25),
    "the first is left out": lambda weights, first, _: _add(weights, first, -0.75),
    "nothing is added": lambda weights, first, second: _add(
        _add(weights, second, -0.25), first, -0.75
    ),
    "the weights are swapped": lambda weights, first, second: _add(
        _add(weights, second, 0.5), first, -0.5
    ),
    "weights of one": lambda weights, first, second: _add(_add(weights, second, 0.75), first, 0.25),
    "the second is subtracted": lambda weights, _, second: _add(weights, second, -0.5),
    "the first is there twice": lambda weights, first, _: _add(weights, first, 0.75),
    "a module loses the second": lambda weights, _, second: _add(weights, second, -0.25, [DOWN]),
    "a layer loses the second": lambda weights, _, second: _add(
        weights, second, -0.25, [key for key in second if ".layers.3." in key]
    ),
    "a module is scaled as without rsLoRA": lambda weights, first, _: _add(
        weights, first, -0.375, [DOWN]
    ),
    "a module has the update of another layer": lambda weights, _, second: (
        weights
        | {DOWN: weights[DOWN] + 0.25 * (second[DOWN.replace("2", "1")] - second[DOWN]).float()}
    ),
    "a matrix is turned": lambda weights, _, second: (
        weights
        | {
            key: weights[key] + 0.25 * (second[key].T - second[key]).float()
            for key in [DOWN.replace("mlp.down", "self_attn.q")]
        }
    ),
    "one number is off": lambda weights, *_: (
        weights | {DOWN: weights[DOWN] + _single(weights[DOWN], 0.05)}
    ),
}


def _single(weight: Tensor, number: float) -> Tensor:
    update = torch.zeros_like(weight)
    update[3, 5] = number
    return update


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Any]]:
    """A proven merge, its adapters, and their updates."""
    place = tmp_path_factory.mktemp("sum")
    folders = [
        save_adapter(place / "first", 1, use_rslora=True, layers_to_transform=[1, 2]),
        save_adapter(place / "second", 2, r=2),
    ]
    out = merge(folders, place / "out", base=TINY, weights=[0.75, 0.25])
    assert prove(out, folders, base=TINY, max_new_tokens=4).holds
    return out, folders, [update_of(folder) for folder in folders]


@pytest.mark.parametrize("damage", BREAKS)
def test_a_broken_merge_is_not_proven(
    merged: tuple[Path, list[Path], list[Any]], tmp_path: Path, damage: str
) -> None:
    intact, folders, updates = merged
    broken = shutil.copytree(intact, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    first, second = ({k: v for k, v in update.items() if k in weights} for update in updates)
    damaged = {k: v.contiguous() for k, v in BREAKS[damage](weights, first, second).items()}
    save_file(damaged, broken / "model.safetensors", metadata={"format": "pt"})
    assert not prove(broken, folders, base=TINY, max_new_tokens=4).holds


def test_updates_of_transposed_layers_are_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    base = str(tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(base)
    targets = ["c_attn", "c_proj", "wte"]  # c_proj of attention is square
    folder = save_adapter(tmp_path / "one", 1, base, target_modules=targets, fan_in_fan_out=True)
    model = load_plain(base).double()
    start = model.state_dict()["transformer.wte.weight"].clone()
    weighted_sum = WeightedSum(model, [find(folder)], [2.0])
    for name, delta in update_of(folder, base).items():
        expected = load_plain(base).state_dict()[name] + 2 * delta
        assert torch.allclose(model.state_dict()[name], expected, atol=1e-6), name
    with weighted_sum.left_out():
        assert torch.equal(model.state_dict()["transformer.wte.weight"], start)
    assert not torch.equal(model.state_dict()["transformer.wte.weight"], start)


def test_an_adapter_with_weights_that_are_not_loras_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", 1)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    removed = next(key for key in weights if "lora_B" in key)
    save_file({key: value for key, value in weights.items() if key != removed}, file)
    with pytest.raises(AdapterError, match="has only one of the matrices A and B"):
        WeightedSum(load_plain(), [find(folder)], [1.0])
    save_file(weights | {"base_model.model.score.weight": torch.ones(1)}, file)
    with pytest.raises(AdapterError, match=r"score\.weight is no LoRA weight"):
        WeightedSum(load_plain(), [find(folder)], [1.0])
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
