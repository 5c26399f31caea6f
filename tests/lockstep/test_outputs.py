"""Outputs are cut from their graph whole, and caches are restored after a failure."""

from __future__ import annotations

import torch
from transformers import DynamicCache, MistralConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from lora_exp.lockstep.outputs import cut, snapshot, tensors_of, without_padding
from lora_exp.lockstep.segment import Segment
from lora_exp.lockstep.state import RandomState


def test_an_output_keeps_its_class_and_every_tensor_is_cut() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    hidden, logits = x * 2, x + 1
    output = MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=(logits, logits))
    ends: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []
    answer = cut(output, ends, leaves)
    assert isinstance(answer, MoeModelOutputWithPast)
    assert [id(end) for end in ends] == [id(hidden), id(logits)]  # each once
    assert answer.router_logits[0] is answer.router_logits[1] is leaves[1]
    (answer.last_hidden_state.sum() + answer.router_logits[0].sum()).backward()
    assert x.grad is None
    torch.autograd.backward(ends, [leaf.grad for leaf in leaves])
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))  # type: ignore[arg-type]
    assert len(tensors_of(answer)) == 3


def test_a_cache_is_restored_as_it_was() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    cache, states = DynamicCache(config=config), torch.randn(1, 2, 6, 8)
    cache.update(states, states, 0)
    restore = snapshot(cache)
    before = cache.layers[0].keys.clone()
    cache.update(states, states, 0)
    cache.update(states, states, 1)
    restore()
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_seq_length() == 6
    assert not cache.layers[1].is_initialized
    lazy = DynamicCache()
    restore = snapshot(lazy)
    lazy.update(states, states, 0)
    restore()
    assert lazy.layers == []
    snapshot(None)()


def test_rows_of_padding_are_left_out() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": mask}
    s = Segment(0, arguments, RandomState.now())
    assert without_padding(s, torch.randn(2, 3, 4)).shape == (5, 4)
    assert without_padding(s, torch.randn(6, 4)).shape == (6, 4)
