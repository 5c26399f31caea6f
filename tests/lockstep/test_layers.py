"""A body's own forward stops at its layers and linear layers, if it runs in a greenlet for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import torch
from transformers import LlamaForCausalLM

from lora_exp.lockstep.layers import (
    Carried,
    LayerCall,
    ProductCall,
    Run,
    alone,
    layers_of,
    stop_at_layers,
)
from lora_exp.lockstep.segment import Pass, PerSegment
from tests.lockstep.kinds import small_model
from tests.lockstep.test_segment import segments

IDS = torch.arange(6).view(2, 3)


def test_a_forward_stops_at_each_layer_and_goes_on_with_the_answer() -> None:
    model = small_model("llama")
    expected = model.model(IDS).last_hidden_state
    stop_at_layers(model.model, [])
    assert torch.equal(model.model(IDS).last_hidden_state, expected)  # not in a greenlet
    run = Run(partial(model.model, input_ids=IDS))
    answer = run.switch()
    names = []
    while isinstance(answer, LayerCall):
        names.append(answer.name)
        layer = model.model.get_submodule(answer.name)
        answer = run.switch(alone(layer, **answer.arguments))
    assert names == ["layers.0", "layers.1"]
    assert torch.equal(answer.last_hidden_state, expected)


def test_a_layer_stops_at_the_bases_products_and_at_no_adapters() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    body: Any = peft.get_peft_model(small_model("llama"), config).get_base_model().base_model
    linear = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]
    stop_at_layers(body, linear)
    run = Run(partial(body.layers[0].mlp, torch.zeros(1, 2, 64)))
    assert run.switch().name == "layers.0.mlp.up_proj"
    run = Run(partial(body.layers[0].self_attn.q_proj, torch.ones(1, 2, 64)))
    call = run.switch()
    assert isinstance(call, ProductCall)
    assert torch.equal(call.rows, torch.ones(1, 2, 64))
    product = torch.full((1, 2, 64), 7.0)
    assert torch.equal(run.switch(product), product)  # the adapter adds zero


def test_hidden_states_are_not_divided_between_layers_unless_a_job_changes_them() -> None:
    p, carried = Pass(segments((1, 2), (2, 3)), 0, None), Carried()
    whole = torch.randn(1, 8, 4)
    parts = carried.divided(p, whole)
    calls = [LayerCall("0", {"hidden_states": x, "attention_mask": None}) for x in parts]
    assert carried.merged(p, calls)["hidden_states"] is whole
    parts[1].add_(1)  # in place
    merged = carried.merged(p, calls)["hidden_states"]
    assert torch.equal(merged[0, 2:], parts[1].view(6, 4))


def test_masks_and_tuples_stay_each_jobs_own() -> None:
    p = Pass(segments((1, 2), (2, 3)), 0, None)
    masks = [torch.zeros(1, 2, 2), torch.zeros(2, 3, 3)]
    calls = [LayerCall("0", {"attention_mask": m, "use_cache": False}) for m in masks]
    merged = Carried().merged(p, calls)
    assert merged["attention_mask"] == PerSegment(tuple(masks))
    assert merged["use_cache"] is False


def test_layers_are_the_outermost_ones() -> None:
    model: LlamaForCausalLM = small_model("llama")
    assert list(layers_of(model.model)) == ["layers.0", "layers.1"]
