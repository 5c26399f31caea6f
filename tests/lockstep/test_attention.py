"""Heads are computed for each job in its own shape and layout, with its own positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.lockstep.attention import FusedAttention, _own_heads, own_function
from lora_exp.lockstep.segment import Pass, PerSegment
from tests.lockstep.kinds import small_model
from tests.lockstep.test_segment import segments


def test_a_jobs_heads_lie_in_memory_as_in_a_run_alone() -> None:
    x_1NHD = torch.randn(1, 10, 4, 16)  # as projected: the tokens come first
    (s,) = segments((2, 5))
    heads = _own_heads(x_1NHD.transpose(1, 2), s)
    alone = x_1NHD.view(2, 5, 4, 16).transpose(1, 2)
    assert torch.equal(heads, alone)
    assert heads.stride() == alone.stride()
    contiguous = _own_heads(x_1NHD.transpose(1, 2).contiguous(), s)
    assert torch.equal(contiguous, alone)
    assert contiguous.is_contiguous()


class Positions(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Tensor, position_embeddings: Any, past_key_values: Any = None) -> Any:
        return position_embeddings, past_key_values


def test_positions_lie_side_by_side_and_caches_are_set_aside() -> None:
    p = Pass(segments((2, 5), (1, 9)), 3, None)
    own = [(torch.randn(1, 5, 4), torch.randn(1, 5, 4)), (torch.randn(1, 9, 4),) * 2]
    body: Any = SimpleNamespace(current=p, known=lambda: torch.no_grad())
    module = FusedAttention(Positions(), body)
    caches = PerSegment(("one", "other"))
    (cos, _), past = module(torch.zeros(1, 22, 8), PerSegment(tuple(own)), past_key_values=caches)
    expected = [own[0][0], own[0][0], own[1][0], torch.zeros(1, 3, 4)]
    assert torch.equal(cos, torch.cat(expected, 1))
    assert past is None
    assert body.pasts is caches


def test_the_function_that_a_kind_computes_its_heads_with_is_its_own() -> None:
    layer = small_model("soft-capped").model.layers[0].self_attn
    own = own_function(layer, "eager")
    assert own is not None
    assert own.__module__ == type(layer).__module__
    assert own_function(layer, "flex_attention") is None
