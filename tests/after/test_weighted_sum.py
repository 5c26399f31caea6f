"""The weighted sum by which merges are judged: right where peft is, and a judge that can say no."""

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


def plain(path: str = TINY) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapter(folder: Path, seed: int, path: str = TINY, **more: Any) -> Path:
    torch.manual_seed(seed)
    own = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | more
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **own)
    peft.get_peft_model(plain(path), config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def update(folder: Path, path: str = TINY) -> dict[str, Tensor]:
    """What peft makes of an adapter alone."""
    before = plain(path).double()
    start = {name: value.clone() for name, value in before.state_dict().items()}
    made = peft.PeftModel.from_pretrained(plain(path), str(folder)).double()
    made.get_base_model().config.tie_word_embeddings = False
    head = made.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it may be tied
    after = made.merge_and_unload().state_dict()
    return {name: after[name] - start[name] for name in start}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(part))
def test_adapters_of_different_parts_become_the_sum_of_what_each_is_alone(
    tmp_path: Path, part: dict[str, Any]
) -> None:
    first, second = adapter(tmp_path / "first", 1, **part), adapter(tmp_path / "second", 2)
    updates = [update(first), update(second)]
    start = plain().state_dict()
    for order in ((0, 1), (1, 0)):
        folders = [(first, second)[i] for i in order]
        out = tmp_path / f"merged{order[0]}"
        merge(folders, out, base=TINY, weights=[0.5, -2.0])
        made = plain(str(out)).state_dict()
        for name in start:
            one, two = (updates[i][name] for i in order)
            wanted = start[name] + 0.5 * one - 2.0 * two
            assert torch.allclose(made[name].double(), wanted, atol=1e-5), name
        assert prove(out, folders, base=TINY, max_new_tokens=4).holds


@pytest.mark.parametrize("method", ["ties", "svd", "linear", "dare_linear"])
def test_no_method_leaves_out_a_layer_that_only_the_second_adapts(
    tmp_path: Path, method: str
) -> None:
    first = adapter(tmp_path / "first", 1, layers_to_transform=[1])
    second = adapter(tmp_path / "second", 2)
    made = plain(str(merge([first, second], tmp_path / "out", base=TINY, method=method)))
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(made.state_dict()[name], plain().state_dict()[name])


def test_what_only_one_has_is_its_own(tmp_path: Path) -> None:
    folders = [
        adapter(tmp_path / name, seed, target_modules=[name])
        for seed, name in enumerate(("q_proj", "up_proj", "o_proj"))
    ]
    made = plain(str(merge(folders, tmp_path / "out", base=TINY))).state_dict()
    start, total = plain().state_dict(), [update(folder) for folder in folders]
    for name in start:
        wanted = start[name] + sum(each[name] for each in total)
        assert torch.allclose(made[name].double(), wanted, atol=1e-5)


Weights = dict[str, Tensor]
DOWN = "model.layers.2.mlp.down_proj.weight"


def _add(made: Weights, what: Weights, weight: float, names: Iterable[str] = ()) -> Weights:
    keys = list(names) or list(what)
    return made | {key: made[key] + weight * what[key].float() for key in keys}


BREAKS: dict[str, Callable[[Weights, Weights, Weights], Weights]] = {
    "the second is left out": lambda made, _, two: _add(made, two, -0.25),
    "the first is left out": lambda made, one, _: _add(made, one, -0.75),
    "nothing is added": lambda made, one, two: _add(_add(made, two, -0.25), one, -0.75),
    "the weights are swapped": lambda made, one, two: _add(_add(made, two, 0.5), one, -0.5),
    "weights of one": lambda made, one, two: _add(_add(made, two, 0.75), one, 0.25),
    "the second is subtracted": lambda made, _, two: _add(made, two, -0.5),
    "the first is there twice": lambda made, one, _: _add(made, one, 0.75),
    "a module loses the second": lambda made, _, two: _add(made, two, -0.25, [DOWN]),
    "a layer loses the second": lambda made, _, two: _add(
        made, two, -0.25, [key for key in two if ".layers.3." in key]
    ),
    "a module is scaled as without rsLoRA": lambda made, one, _: _add(made, one, -0.375, [DOWN]),
    "a module has the update of another layer": lambda made, _, two: (
        made | {DOWN: made[DOWN] + 0.25 * (two[DOWN.replace("2", "1")] - two[DOWN]).float()}
    ),
    "a matrix is turned": lambda made, _, two: (
        made
        | {
            key: made[key] + 0.25 * (two[key].T - two[key]).float()
            for key in [DOWN.replace("mlp.down", "self_attn.q")]
        }
    ),
    "one number is off": lambda made, *_: made | {DOWN: made[DOWN] + _single(made[DOWN], 0.05)},
}


def _single(like: Tensor, number: float) -> Tensor:
    made = torch.zeros_like(like)
    made[3, 5] = number
    return made


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    place = tmp_path_factory.mktemp("sum")
    folders = [
        adapter(place / "first", 1, use_rslora=True, layers_to_transform=[1, 2]),
        adapter(place / "second", 2, r=2),
    ]
    return merge(folders, place / "out", base=TINY, weights=[0.75, 0.25]), folders


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_merge_is_not_proven(
    merged: tuple[Path, list[Path]], tmp_path: Path, way: str
) -> None:
    right, folders = merged
    assert prove(right, folders, base=TINY, max_new_tokens=4).holds
    broken = shutil.copytree(right, tmp_path / "broken")
    made = load_file(broken / "model.safetensors")
    one, two = ({k: v for k, v in update(f).items() if k in made} for f in folders)
    weights = {k: v.contiguous() for k, v in BREAKS[way](made, one, two).items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert not prove(broken, folders, base=TINY, max_new_tokens=4).holds


def test_layers_that_hold_their_matrix_turned_are_added_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    base = str(tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(base)
    targets = ["c_attn", "c_proj", "wte"]  # c_proj of attention is square
    folder = adapter(tmp_path / "one", 1, base, target_modules=targets, fan_in_fan_out=True)
    model = plain(base).double()
    start = model.state_dict()["transformer.wte.weight"].clone()
    added = WeightedSum(model, [find(folder)], [2.0])
    for name, delta in update(folder, base).items():
        wanted = plain(base).state_dict()[name] + 2 * delta
        assert torch.allclose(model.state_dict()[name], wanted, atol=1e-6), name
    with added.left_out():
        assert torch.equal(model.state_dict()["transformer.wte.weight"], start)
    assert not torch.equal(model.state_dict()["transformer.wte.weight"], start)


def test_an_adapter_with_other_weights_than_loras_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "one", 1)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if "lora_B" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, file)
    with pytest.raises(AdapterError, match="has only one of the matrices A and B"):
        WeightedSum(plain(), [find(folder)], [1.0])
    save_file(weights | {"base_model.model.score.weight": torch.ones(1)}, file)
    with pytest.raises(AdapterError, match=r"score\.weight is no LoRA weight"):
        WeightedSum(plain(), [find(folder)], [1.0])
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
