"""Stacks of experts in 4 bits: their values, gradients, and what a backward keeps of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, DbrxConfig, Qwen2MoeConfig

from lora_exp import compose
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.errors import ConfigError
from lora_exp.model import experts as experts_file
from lora_exp.model.experts import dequantise_stacks, expert_modules, quantised_stacks, stacks
from lora_exp.model.loading import base_of
from lora_exp.model.quantised import dequantise
from lora_exp.model.sharing import sharing_copy

QWEN = Qwen2MoeConfig(
    vocab_size=512, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=1024,
)  # fmt: skip
PARTS = ("gate", "up", "down")
STACKS = {
    f"model.layers.{layer}.mlp.experts.{key}": shape
    for layer in (0, 1)
    for key, shape in {"gate_up_proj": (4, 64, 64), "down_proj": (4, 64, 32)}.items()
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, base: Any) -> Path:
    """Save a mixture in bfloat16, whose experts matter: of random weights they hardly do."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    model = AutoModelForCausalLM.from_config(QWEN)
    for name in stacks(model):
        torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, *overrides: str) -> Any:
    place = ["model=local", f"model.path={folder}", "model.dtype=bfloat16"]
    return base_of(compose(*place, *overrides)).model


def gradient(model: Any) -> Tensor:
    """Return the gradient of some hidden states [1, T, C]."""
    torch.manual_seed(1)
    states = torch.randn(1, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs_embeds=states, use_cache=False).logits.float().square().mean()
    loss.backward()
    assert states.grad is not None
    return states.grad


def test_stacks_are_quantised_while_they_are_read(mixture: Path) -> None:
    floats, model = load(mixture), load(mixture, "quant=nf4")
    assert stacks(floats) == stacks(model) == STACKS
    assert quantised_stacks(model).keys() == STACKS.keys()
    assert not quantised_stacks(floats)
    for name in STACKS:
        weight = floats.get_parameter(name)
        row = weight.flatten()
        packed, state = functional.quantize_4bit(row, compress_statistics=True, quant_type="nf4")
        module, _, key = name.rpartition(".")
        value = getattr(model.get_submodule(module), key)
        assert torch.equal(value.flatten(), functional.dequantize_4bit(packed, state).flatten())
        assert 0.08 < (value - weight).abs().mean() / weight.abs().mean() < 0.1


def test_named_experts_stay_in_floats(mixture: Path) -> None:
    assert not quantised_stacks(load(mixture, "quant=nf4", "quant.experts=false"))
    assert not quantised_stacks(load(mixture, "quant=int8"))
    kept = quantised_stacks(load(mixture, "quant=fp4", "quant.skip_modules=[layers.0.mlp.experts]"))
    assert kept.keys() == {name for name in STACKS if ".1." in name}
    assert {stack.quant_state.quant_type for stack in kept.values()} == {"fp4"}


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_same_experts_in_floats(
    implementation: str, checkpointing: bool, mixture: Path
) -> None:
    model, in_floats = load(mixture, "quant=nf4").train(), load(mixture, "quant=nf4").train()
    dequantise_stacks(in_floats)
    for each in (model, in_floats):
        each.set_experts_implementation(implementation)
        if checkpointing:
            each.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradient(model), gradient(in_floats))
    assert not torch.equal(gradient(model), gradient(load(mixture)))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_a_backward_keeps_no_experts_in_floats(implementation: str, mixture: Path) -> None:
    model, seen = load(mixture, "quant=nf4").train(), list[StorageWeakRef]()
    model.set_experts_implementation(implementation)
    for name in expert_modules(model):
        experts = model.get_submodule(name)
        experts.register_forward_hook(
            lambda module, *_: seen.append(StorageWeakRef(module.gate_up_proj.untyped_storage()))
        )
    states = torch.randn(1, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    loss = model(inputs_embeds=states, use_cache=False).logits.float().square().mean()
    assert [ref.expired() for ref in seen] == [True, False]  # the last layer's are kept
    loss.backward()
    assert [ref.expired() for ref in seen] == [True, True]


def test_a_forward_that_fails_leaves_no_hooks_behind(mixture: Path) -> None:
    model = load(mixture, "quant=nf4").train()
    experts = model.get_submodule(next(expert_modules(model)))
    with pytest.raises((RuntimeError, IndexError)):
        experts(torch.randn(3, 7, requires_grad=True), torch.zeros(3, 2).long(), torch.ones(3, 2))
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_copies_share_the_stacks(mixture: Path) -> None:
    model = load(mixture, "quant=nf4")
    copied = sharing_copy(model)
    pairs = zip(quantised_stacks(model).items(), quantised_stacks(copied).items(), strict=True)
    for (name, stack), (copied_name, copied_stack) in pairs:
        assert (name, id(stack)) == (copied_name, id(copied_stack))
    assert torch.equal(gradient(copied), gradient(model))


def test_a_dequantised_mixture_is_saved_plainly(mixture: Path, tmp_path: Path) -> None:
    loaded = load(mixture, "quant=nf4")
    gradient(loaded)  # one layer's experts are kept in bfloat16
    model = dequantise(loaded, torch.float32)
    assert not quantised_stacks(model)
    fresh = dequantise(load(mixture, "quant=nf4"), torch.float32)
    for name in STACKS:
        assert torch.equal(model.get_parameter(name), fresh.get_parameter(name))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    for name in STACKS:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def test_stacks_of_other_shapes_are_quantised(folder_of: Callable[[Any], Path]) -> None:
    config = DbrxConfig(
        vocab_size=512, d_model=64, n_layers=1, n_heads=2, max_seq_len=1024,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    )  # fmt: skip
    model = load(folder_of(config), "quant=nf4")
    assert set(stacks(model).values()) == {(128, 64)}  # [E inner, C]
    assert quantised_stacks(model).keys() == stacks(model).keys()
    assert torch.isfinite(gradient(model)).all()


def changed(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Copy a base, and change its weights."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return place


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    ("ends", "cut", "message"),
    [
        ([".1.mlp.experts.3.up_proj.weight"], None, "cannot put its weights together"),
        (
            [".1.mlp.experts.3.up_proj.weight", "experts.3.gate_proj.weight"],
            None,
            "cannot put|size",
        ),
        (
            [f"layers.0.mlp.experts.{e}.{k}_proj.weight" for e in range(4) for k in PARTS],
            None,
            "lack",
        ),
        (["gate_proj.weight"], 16, "another size|other sizes"),
    ],
    ids=["a part", "an expert's parts", "a layer's experts", "half of each gate"],
)
def test_damaged_experts_are_refused_as_in_floats(
    ends: list[str], cut: int | None, message: str, quant: str, mixture: Path, tmp_path: Path
) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if ".experts." in key and key.endswith(tuple(ends))]:
            part = weights.pop(key)
            if cut is not None:
                weights[key] = part[:cut].clone()

    place = changed(mixture, tmp_path / "damaged", damage)
    with pytest.raises(ConfigError, match=rf"^model\.path: .*({message})"):
        load(place, f"quant={quant}")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_layer_of_another_size_is_refused(
    quant: str, mixture: Path, tmp_path: Path
) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    place = changed(mixture, tmp_path / "cut", lambda w: w.update({key: w[key][:32].clone()}))
    with pytest.raises(ConfigError, match=rf"^model\.path: .*{key}: \[32, 64\], not \[64, 64\]"):
        load(place, f"quant={quant}")


def test_stacks_that_bitsandbytes_cannot_count_are_refused(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_file, "LARGEST", 4 * 64 * 64)
    with pytest.raises(ConfigError, match=r"32 bits, and .*gate_up_proj has more; quant.experts="):
        load(mixture, "quant=nf4")


def test_others_hooks_see_all_but_the_stacks(mixture: Path) -> None:
    """As trl's offloading of activations."""
    model, seen = load(mixture, "quant=nf4").train(), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor

    expected = gradient(model)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert torch.equal(gradient(model), expected)
    stack_sizes = {4 * 64 * 64, 4 * 64 * 32}
    assert len(seen) > 20
    assert not stack_sizes & {*seen}


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_an_adapter_on_experts_in_4_bits_is_merged_with_a_proof(
    into: Any, mixture: Path, quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    place = ["model=local", f"model.path={mixture}", "quant=nf4", "train.learning_rate=1e-2"]
    run = quick_run(*place, "samples.rows=0").directory
    merged = merge([run], tmp_path / "merged", into=into, dtype="float32")
    proof = prove(merged, [run])
    assert proof.holds
    assert proof.max_difference < 1e-3 < proof.effect
