"""Layers that get no gradient, measured on the base before anything is adapted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_exp.errors import ConfigError
from lora_exp.model import participation
from lora_exp.model.loading import bnb_4bit
from lora_exp.model.participation import unused
from tests.conftest import tiny

LAYER = "model.layers.1.mlp"


class Reads(nn.Module):
    """A block that calls one layer, reads the other's weight itself, and drops a third's result."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.gate_proj = mlp.up_proj, mlp.down_proj, mlp.gate_proj

    def forward(self, x: Any) -> Any:
        self.gate_proj(x)
        return nn.functional.linear(self.up_proj(x), self.down_proj.weight)


class ReadsInTraining(nn.Module):
    """A block that calls its layers, but in training reads one's weight, and draws a number."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

    def combine(self, x: Any) -> Any:
        if self.training:
            torch.rand(1)
            return nn.functional.linear(self.up_proj(x), self.down_proj.weight.clamp(-9, 9))
        return self.down_proj(self.up_proj(x))


class Combines(nn.Module):
    """Calls a method of a block that is not its forward, as Gemma 3n does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any) -> Any:
        return self.block.combine(x)


class Grouped(nn.Linear):
    """A product in two groups, each half as wide as the outputs, as DeepSeek V4 has."""

    def forward(self, x: Any) -> Any:
        groups = x.unflatten(-1, (2, -1)).transpose(-2, -3)
        return (groups @ self.weight.unflatten(0, (2, -1)).mT).transpose(-2, -3)


class Skips(nn.Module):
    """A layer that training leaves out."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, **options: Any) -> Any:
        return x if self.training else self.layer(x, **options)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(participation, "_taking_part", {})

    def replace(model: Any) -> Any:
        model.model.layers[1].mlp = Reads(model.model.layers[1].mlp)
        return model

    return replace


def test_layers_without_a_gradient_are_found_and_nothing_changes(
    reading: Any, fresh_base: Any
) -> None:
    model = fresh_base.model.train()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert unused(model, linear, None) == set()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    reading(model)
    unused_names = {f"{LAYER}.down_proj", f"{LAYER}.gate_proj"}
    assert unused(model, linear, "hash") == unused_names
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_layer_whose_weight_only_training_reads_is_found(fresh_base: Any) -> None:
    model = fresh_base.model
    mlp = model.model.layers[1].mlp
    random_state = torch.get_rng_state()
    linear = [f"{LAYER}.block.up_proj", f"{LAYER}.block.down_proj"]
    model.model.layers[1].mlp = Combines(ReadsInTraining(mlp))
    assert unused(model, linear, None) == {f"{LAYER}.block.down_proj"}
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.training


def test_a_layer_that_training_skips_with_its_block_takes_part(fresh_base: Any) -> None:
    model = fresh_base.model
    model.model.layers[1] = Skips(model.model.layers[1])
    assert unused(model, ["model.layers.1.layer.mlp.up_proj"], None) == set()


def test_a_layer_that_computes_in_groups_is_found(fresh_base: Any) -> None:
    model, layer = fresh_base.model, Grouped(96, 64, bias=False)
    mlp = model.model.layers[1].mlp
    mlp.add_module("grouped", layer)
    mlp.register_forward_hook(lambda _m, _x, out: out * layer(out).mean())
    assert unused(model, [f"{LAYER}.grouped", f"{LAYER}.up_proj"], None) == {f"{LAYER}.grouped"}


def test_embeddings_may_be_scaled_in_place(fresh_base: Any) -> None:
    model = fresh_base.model
    first = model.model.layers[0]
    first.register_forward_pre_hook(lambda _m, x: (x[0].mul_(2.0), *x[1:]))
    assert unused(model, [f"{LAYER}.up_proj"], None) == set()


def test_a_base_that_cannot_compute_is_refused_in_a_line(fresh_base: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("4 is not divisible by chunk size 16\nmore")

    fresh_base.model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ConfigError, match=r"^model.path: Llama.* by chunk size 16$"):
        unused(fresh_base.model, [f"{LAYER}.up_proj"], None)


def test_a_base_is_measured_once(reading: Any, fresh_base: Any) -> None:
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "hash") == set()
    reading(fresh_base.model)
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "hash") == set()
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "other") == {f"{LAYER}.down_proj"}


def test_a_block_that_reads_them_by_a_method_of_its_own_is_named() -> None:
    model = tiny(bnb_4bit("nf4", True, "float32")).model
    model.model.layers[1].mlp = Combines(ReadsInTraining(model.model.layers[1].mlp))
    expected = r"^quant.skip_modules: ReadsInTraining .*\[up_proj,down_proj\]$"
    with pytest.raises(ConfigError, match=expected):
        unused(model, [f"{LAYER}.block.up_proj"], None)


def test_quantised_weights_that_a_class_reads_itself_are_named(reading: Any) -> None:
    model = reading(tiny(bnb_4bit("nf4", True, "float32")).model)
    with pytest.raises(
        ConfigError, match=r"^quant.skip_modules: Reads .*up_proj,down_proj"
    ) as info:
        unused(model, [f"{LAYER}.up_proj"], None)
    assert "\n" not in str(info.value)
