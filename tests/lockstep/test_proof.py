"""A proof compares outputs and gradients, and allows only operations on numbers one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lora_exp.lockstep import proof
from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import PLAIN, ComputeState
from tests.lockstep.kinds import small_model

TRAINING = PassContext(PLAIN, True, False)
EVALUATION = PassContext(ComputeState(False, PLAIN.autocast), False, False)


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    yield
    PLAIN.restore()


def fused_body(context: PassContext, kind: str = "llama") -> FusedBody:
    fused = FusedBody(small_model(kind).base_model, "exact")
    context.compute_state.restore()
    fused._set_context(context)
    fused.own_layers[context] = False
    return fused


class Gate(nn.Module):
    """An activation that is not measured: its last bits could depend on the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()


class Doubled(torch.autograd.Function):
    """Changes only gradients, and only of many rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return dy * 2 if dy.shape[1] > 100 else dy


class Clone(nn.Module):
    """The identity, but for `Doubled`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(x)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("context", [TRAINING, EVALUATION], ids=["training", "evaluation"])
def test_passes_of_a_known_kind_do_not_differ(context: PassContext) -> None:
    assert proof.difference(fused_body(context)) is None


def test_an_operation_that_is_not_known_to_be_exact_is_refused() -> None:
    fused = fused_body(TRAINING)
    fused.blocks["layers.1"].mlp.act_fn = Gate()
    with pytest.raises(Unmeasured, match="sigmoid"):
        proof.difference(fused)


def test_gradients_that_differ_only_in_shared_passes_are_detected() -> None:
    fused = fused_body(TRAINING)
    norm = fused.blocks["layers.1"].input_layernorm
    fused.blocks["layers.1"].input_layernorm = nn.Sequential(norm, Clone())
    assert "gradients" in (proof.difference(fused) or "")


def test_a_cache_that_is_not_filled_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fused_body(EVALUATION)
    for block in fused.blocks.values():  # as if attention did not know the argument
        monkeypatch.setattr("lora_exp.lockstep.attention.PASTS", ())
        block.self_attn.base.forward = lambda *a, f=block.self_attn.base.forward, **k: f(
            *a, **{**k, "past_key_values": None}
        )
    assert "next tokens" in (proof.difference(fused) or "")
