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


def test_a_base_is_measured_once(reading: Any, fresh_base: Any) -> None:
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "hash") == set()
    reading(fresh_base.model)
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "hash") == set()
    assert unused(fresh_base.model, [f"{LAYER}.down_proj"], "other") == {f"{LAYER}.down_proj"}


def test_quantised_weights_that_a_class_reads_itself_are_named(reading: Any) -> None:
    model = reading(tiny(bnb_4bit("nf4", True, "float32")).model)
    with pytest.raises(
        ConfigError, match=r"^quant.skip_modules: Reads .*up_proj,down_proj"
    ) as info:
        unused(model, [f"{LAYER}.up_proj"], None)
    assert "\n" not in str(info.value)
