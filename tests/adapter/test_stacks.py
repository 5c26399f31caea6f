"""The file of an adapter does not name the parameters that it adapts: their order is found."""

from __future__ import annotations

import torch

from lora_exp.adapter.stacks import factors_of_experts, parameters_of

TARGETS = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj", "mlp.up_proj.weight"]}
INNER, OUTER = "layers.0.mlp.experts.base_layer", "layers.0.mlp.experts"


def test_ranks_tell_which_parameter_is_which() -> None:
    config = TARGETS | {"r": 4, "rank_pattern": {"down_proj": 2}}
    heights = {INNER: 8, OUTER: 16, "layers.0.mlp.up_proj": 4, "layers.0.self_attn.q_proj": 4}
    assert parameters_of(heights, config, "") == {
        INNER: ("layers.0.mlp.experts.down_proj", 4),
        OUTER: ("layers.0.mlp.experts.gate_up_proj", 4),
        "layers.0.mlp.up_proj": ("layers.0.mlp.up_proj.weight", 1),
    }


def test_of_equal_ranks_what_leads_out_of_the_experts_is_last() -> None:
    heights = {OUTER: 32, INNER: 32}
    names = parameters_of(heights, TARGETS | {"r": 4}, "")
    assert names[INNER] == ("layers.0.mlp.experts.gate_up_proj", 8)
    assert names[OUTER] == ("layers.0.mlp.experts.down_proj", 8)


def test_heights_that_fit_no_number_of_experts_name_no_parameter() -> None:
    assert parameters_of({INNER: 6, OUTER: 16}, TARGETS | {"r": 4}, "") == {}


def test_the_factors_of_an_expert_are_together_in_a_and_apart_in_b() -> None:
    first, second = torch.arange(12.0).reshape(6, 2), torch.arange(18.0).reshape(3, 6)
    (a, b), _, (last_a, last_b) = factors_of_experts(first, second, 3)
    assert torch.equal(a, first[:2])
    assert torch.equal(b, second[:, [0, 3]])
    assert torch.equal(last_a, first[4:])
    assert torch.equal(last_b, second[:, [2, 5]])
