"""A probe shows another order of summation, where random rows do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_exp.lockstep.probe import Probe
from lora_exp.lockstep.products import APART
from lora_exp.model.loading import bnb_4bit, bnb_8bit
from tests.conftest import tiny
from tests.lockstep.processors import (
    LINEAR,
    SimulatedLinear,
    band_linear,
    sequential_matmul,
    simulated_processor,
)


def in_band(rows: int) -> bool:
    return 37 <= rows <= 191


def probe_of(layer: Any, dtype: torch.dtype = torch.bfloat16) -> Probe:
    return Probe(layer, (layer.in_features,), dtype)


@pytest.mark.parametrize("by_place", [False, True])
def test_random_rows_do_not_show_what_the_probe_shows(by_place: bool) -> None:
    torch.manual_seed(0)
    layer = SimulatedLinear(32, 48, in_band, by_place=by_place)
    with torch.no_grad():
        x = torch.randn(1, 45, 32, dtype=torch.bfloat16)
        alone, together = layer(x[:, :30]), layer(x)[:, :30]
        assert (alone != together).sum() <= 1  # of 1440 numbers
        alone_class, together_class = (probe_of(layer).class_of(rows) for rows in (30, 45))
    assert alone_class == APART or alone_class != together_class


@pytest.mark.parametrize("shape", [(32, 48), (128, 64), (65, 33)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_band_of_rows_is_a_class_of_its_own(shape: tuple[int, int], grad: bool) -> None:
    probe = probe_of(SimulatedLinear(*shape, in_band))
    with torch.set_grad_enabled(grad):
        classes = {rows: probe.class_of(rows) for rows in (24, 36, 37, 100, 191, 192, 300)}
    assert classes[36] == classes[24] == classes[192] == classes[300]
    assert classes[37] == classes[100] == classes[191]
    assert None not in classes.values()
    assert classes[36] != classes[37]


def test_rows_whose_bits_depend_on_their_place_share_no_product() -> None:
    probe = probe_of(SimulatedLinear(64, 96, in_band, by_place=True))
    assert probe.class_of(40) not in (None, APART)
    assert probe.class_of(43) == APART


def test_a_difference_in_the_gradient_only_is_shown() -> None:
    layer = SimulatedLinear(48, 32, in_band, backward_only=True, dtype=torch.float32)
    probe = probe_of(layer, torch.float32)
    with torch.no_grad():
        assert probe.class_of(16) == probe.class_of(40)
    assert probe.class_of(16) != probe.class_of(40)


def test_rounding_products_before_summation_is_another_class() -> None:
    class Unfused(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.float64)
            for k in range(self.in_features):  # in one order: with a rounded product, or without
                terms = x[..., k, None].double() * self.weight[:, k].double()
                y = (y + (terms.float().double() if x.shape[1] > 20 else terms)).float().double()
            return y.float()

    probe = probe_of(Unfused(64, 48, bias=False).requires_grad_(False), torch.float32)
    with torch.no_grad():
        assert probe.class_of(20) == probe.class_of(3) != probe.class_of(21)


def test_a_bias_that_is_added_first_is_another_class() -> None:
    class BiasFirst(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ones = torch.ones_like(x[..., :1])
            terms, weight = (
                torch.cat([ones, x], -1),
                torch.cat([self.bias[:, None], self.weight], 1),
            )
            if x.shape[1] > 20:
                return sequential_matmul(terms, weight.T, True)
            return sequential_matmul(terms.roll(-1, -1), weight.roll(-1, -1).T, True)

    probe = probe_of(BiasFirst(64, 96).requires_grad_(False), torch.float32)
    with torch.no_grad():
        assert probe.class_of(20) == probe.class_of(8) != probe.class_of(21)


def test_a_layer_without_rounding_errors_shares_no_product() -> None:
    class Exact(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return LINEAR(x.double(), self.weight.double()).to(x.dtype) * 0

    assert (
        probe_of(Exact(64, 96, bias=False).requires_grad_(False), torch.float32).class_of(8)
        == APART
    )


def test_a_bias_does_not_hide_a_difference() -> None:
    class Biased(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return band_linear(x, self.weight, self.bias)

    probe = probe_of(Biased(64, 96).requires_grad_(False), torch.float32)
    assert probe.class_of(36) != probe.class_of(37)


def test_a_layer_whose_rows_depend_on_each_other_has_no_class() -> None:
    class Mixing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * x.abs().amax()

    assert probe_of(Mixing(32, 48), torch.float32).class_of(64) is None


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_quantised_layers_show_their_product(quant: str) -> None:
    settings = bnb_8bit(6.0) if quant == "int8" else bnb_4bit(quant, True, "float32")  # type: ignore[arg-type]
    model = tiny(settings).model.train()
    layer = model.model.layers[0].mlp.down_proj
    before = layer(torch.ones(1, 3, layer.in_features))
    with simulated_processor(band_linear), torch.no_grad():
        probe = probe_of(layer, torch.float32)
        assert probe.class_of(36) == probe.class_of(32)
        assert probe.class_of(36) != probe.class_of(37)
    assert torch.equal(before, layer(torch.ones(1, 3, layer.in_features)))  # the layer is unchanged


def test_eight_bit_layers_in_evaluation_have_no_class() -> None:
    model = tiny(bnb_8bit(6.0)).model.eval()
    with torch.no_grad():
        assert probe_of(model.model.layers[0].mlp.up_proj, torch.float32).class_of(64) is None


def test_a_weight_of_an_unknown_dtype_has_no_class() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    assert probe_of(layer, torch.float32).class_of(8) is None


def test_a_norm_rounded_to_bfloat16_still_shows_another_order() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            squares = x.float().pow(2)
            half = squares.shape[-1] // 2
            mean = squares.mean(-1, keepdim=True)
            if x.shape[1] > 20:
                mean = squares[..., :half].sum(-1, keepdim=True)
                mean = (mean + squares[..., half:].sum(-1, keepdim=True)) / squares.shape[-1]
            return (x.float() * torch.rsqrt(mean + 1e-6)).to(x.dtype)

    probe = Probe(Norm(), (192,), torch.bfloat16)
    with torch.no_grad():
        assert probe.class_of(1) == probe.class_of(20)
        assert probe.class_of(20) != probe.class_of(21) == probe.class_of(90)
