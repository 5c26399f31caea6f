"""A base on several devices: their hooks, put on by accelerate, on the processor alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from lora_exp import load_adapter
from lora_exp.after.loading import load, load_base, merged, side_by_side
from lora_exp.after.saved import Saved, find
from lora_exp.errors import ConfigError
from lora_exp.model.loading import Base
from lora_exp.model.placement import device, device_map, placed

IDS = torch.arange(5, 25)[None]
Trained = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        computed: torch.Tensor = model(input_ids=IDS).logits
    return computed


def spread(saved: Saved) -> Base:
    """Load a base with the hooks of one that lies on several devices."""
    base = load_base(saved)
    hooked = dispatch_model(base.model, {"": "cpu"}, force_hooks=True)
    assert hooked.model.layers[0].mlp._hf_hook is not None
    return replace(base, model=hooked)


def test_adapters_side_by_side_answer_as_they_do_on_one_device(trained: Trained) -> None:
    several = [find(trained()), find(trained("seed=7", "peft.r=4"))]
    for saved, one in zip(several, side_by_side(several, spread(several[0])), strict=True):
        assert torch.equal(logits(one.model), logits(load_adapter(saved.folder)[0]))


def test_a_merge_is_the_same_as_on_one_device(trained: Trained) -> None:
    saved = find(trained())
    model = merged(load(saved, spread(saved)).model)
    expected = load_adapter(saved.folder, merge=True)[0].state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_device_map_counts_within_its_block(trained: Trained) -> None:
    one = {"device_map": {"": device()}}
    with placed("auto"), placed(None):
        assert device_map(anyway=False) == {"device_map": "auto"}
    assert device_map(anyway=True) == one
    assert device_map(anyway=False) == (one if torch.cuda.is_available() else {})
    models = [load_adapter(trained(), device_map=where)[0] for where in (None, "auto")]
    assert torch.equal(*map(logits, models))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_parts_that_no_device_has_room_for_are_refused(trained: Trained, quant: str) -> None:
    halves = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ConfigError, match=r"device_map: .*of the base do not fit onto the devices"):
        load_adapter(trained(), quant=quant, device_map=halves)
