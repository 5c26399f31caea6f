"""Modules that run for each job share the products at which all jobs arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_exp.lockstep import segmentwise
from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.layers import ProductCall
from lora_exp.lockstep.segment import Pass, PassContext
from lora_exp.lockstep.state import PLAIN
from tests.lockstep.kinds import small_model
from tests.lockstep.test_segment import segments

TRAINING = PassContext(PLAIN, True, False)
Q = "layers.0.self_attn.q_proj"


@pytest.fixture
def fused() -> FusedBody:
    fused = FusedBody(small_model("llama").base_model, "exact")
    assert fused.enter(TRAINING)
    return fused


def products(fused: FusedBody, *calls: Any) -> list[Any]:
    (p,) = fused.passes(segments((1, 8), (2, 8)))
    with fused._running(p):
        return segmentwise._products(fused, list(calls))


def test_products_at_which_all_jobs_arrive_are_shared(fused: FusedBody) -> None:
    x, y = torch.randn(1, 8, 64), torch.randn(2, 8, 64)
    linear = fused.reference.get_submodule(Q)
    shared = products(fused, ProductCall(Q, x), ProductCall(Q, y))
    assert [torch.equal(a, linear(b)) for a, b in zip(shared, (x, y), strict=True)] == [True] * 2
    shared[0].add_(1)  # a job's own code may write into its product
    flat = products(fused, ProductCall(Q, x[0]), ProductCall(Q, y.view(16, 64)))
    assert torch.equal(flat[1], linear(y.view(16, 64)))


def test_products_of_other_layers_or_layouts_are_each_jobs_own(fused: FusedBody) -> None:
    x, y = torch.randn(1, 8, 64), torch.randn(2, 8, 64)
    strided = torch.randn(2, 64, 8).transpose(1, 2)
    for other in (ProductCall("layers.0.mlp.up_proj", y), ProductCall(Q, strided),
                  ProductCall(Q, y[:, :5]), ProductCall(Q, y.double()), "ended"):  # fmt: skip
        assert products(fused, ProductCall(Q, x), other) == [None, None]


def test_stacked_adapters_share_products_where_jobs_run_their_own_layers() -> None:
    fused = FusedBody(small_model("llama").base_model, "bmm")
    assert fused.enter(TRAINING)
    x, y = torch.randn(1, 8, 64), torch.randn(2, 8, 64)
    shared = products(fused, ProductCall(Q, x), ProductCall(Q, y))
    linear = fused.reference.get_submodule(Q)
    for product, rows in zip(shared, (x, y), strict=True):
        assert torch.allclose(product, linear(rows), atol=1e-5)
    (p,) = fused.passes(segments((1, 8), (2, 8)))
    assert fused.count_products(p) == (2 * len(fused.linears),) * 2
    (alone,) = fused.passes(segments((1, 8)))
    assert fused.count_products(alone) == (0, 0)


def test_a_pass_of_one_job_has_its_own_products(fused: FusedBody) -> None:
    with fused._running(Pass(segments((1, 8)), 0, None)):
        call = ProductCall(Q, torch.randn(1, 8, 64))
        assert segmentwise._products(fused, [call]) == [None]
