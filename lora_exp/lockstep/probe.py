"""A probe: a layer and rows whose sums would be zero but for the order in which they are added.

A random sum hides that order: bfloat16 products are added up in float32 and rounded at the end, so
another order shows in about one of ten thousand results. Here the terms cancel in pairs that lie
far apart, and what is left is rounding alone. Shapes: N rows; C channels in, O out.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

DISTINCT = 12  # rows that a layer without a weight to choose (a norm) is tried with
OTHERS = (2, 40, 150)  # rows beside which a first row must come out the same
SPREAD = {torch.float16: 8, torch.bfloat16: 12, torch.float32: 12}  # powers of two, either way


class Probe:
    """What tells which numbers of rows a layer computes with the same bits."""

    def __init__(self, layer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make a probe of a layer as it computes now: in the gradient and autocast modes set.

        Args:
            layer: works on each row by itself; its weights are left alone.
            shape: of one row that it is given, (C,) or (heads, C).
            dtype: of the rows.
        """
        g = torch.Generator().manual_seed(0)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        self.layer: Any = layer
        if isinstance(layer, nn.Linear):
            x_C, columns = _cancelling(layer.in_features, g)
            y_O, rows = _cancelling(layer.out_features, g)
            signs = torch.randint(2, (len(y_O), len(x_C)), generator=g) * 2.0 - 1
            self.layer = _holding(layer, signs[rows][:, columns])
            self.rows = [x_C.to(device, dtype)]
            self.gradients = [y_O.to(device)]
        else:  # squares never cancel; many rows in full precision make up for it
            drawn = torch.randn(2, DISTINCT, *shape, generator=g).to(device)
            self.rows, self.gradients = [drawn[0, 0].to(dtype), *drawn[0]], [drawn[1, 0], *drawn[1]]
        self.apart = self.layer is not None and self._rows_apart(shape, dtype, device, g)

    def class_of(self, rows: int) -> str | None:
        """Return what a number of rows has in common with all that are computed alike.

        Returns:
            A hash; None where rows of this number do not all come out alike, or see each other.
        """
        if not self.apart:
            return None
        digest = hashlib.sha256()
        for x, dy in zip(self.rows, self.gradients, strict=True):
            many = (t.expand(1, rows, *t.shape).contiguous() for t in (x, dy))
            for out in _computed(self.layer, *many):
                first = out[:, :1].contiguous()
                if not torch.equal(out, first.expand_as(out)):
                    return None
                digest.update(first.view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _rows_apart(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        g: torch.Generator,
    ) -> bool:
        """Say whether a row comes out the same whatever the others hold.

        8-bit layers find outliers by the column of all rows, so some columns get large values.
        """
        gradient = self.gradients[0]
        for count in OTHERS:
            drawn = torch.randn(3, 1, count, *shape, generator=g)
            drawn[1:, :, :, ..., ::3] *= 30
            drawn[:, :, 0] = drawn[0, :, 0]
            dy = torch.randn(1, count, *gradient.shape, generator=g).to(device)
            first, *others = (_computed(self.layer, x.to(device, dtype), dy) for x in drawn)
            pairs = (pair for other in others for pair in zip(first, other, strict=True))
            if not all(torch.equal(a[:, 0], b[:, 0]) for a, b in pairs):
                return False
        return True


def _cancelling(size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return values that cancel in pairs, and for each place the pair that it belongs to.

    Their powers of two are far apart, so that a sum in float32 loses the small ones; weights of one
    sign a pair then keep the sum at zero, in any order but for the rounding.
    """
    order = torch.randperm(size, generator=g)
    half = size // 2
    one, other = order[:half], order[half : 2 * half]
    spread = SPREAD[torch.bfloat16]
    values, pair_of = torch.zeros(size), torch.zeros(size, dtype=torch.long)
    exponent = torch.randint(-spread, spread + 1, (half,), generator=g)
    values[one] = (1 + torch.rand(half, generator=g)) * 2.0**exponent
    values[other] = -values[one]
    pair_of[one] = pair_of[other] = torch.arange(half)
    return values, pair_of


def _holding(layer: Any, weight_OC: Tensor) -> Any:
    """Return a layer of the same kind and settings with another weight, quantised as its own.

    Signs are kept exactly by every quantisation: each is the largest value of its block.

    Returns:
        None for a kind of weight that is not known.
    """
    made, old = copy.copy(layer), layer.weight
    made._parameters = dict(layer._parameters)
    if layer.bias is not None:  # it would hide what is left of the sums
        made._parameters["bias"] = nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)
    state = getattr(old, "quant_state", None)
    if state is not None:
        new, made.quant_state = bitsandbytes.functional.quantize_4bit(
            weight_OC.to(old.device, state.dtype),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
        )
        kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in kept}
        made._parameters["weight"] = bitsandbytes.nn.Params4bit(
            new, quant_state=made.quant_state, bnb_quantized=True, **settings
        )
    elif isinstance(old, bitsandbytes.nn.Int8Params):
        made.state = copy.copy(layer.state)
        made.state.CB, made.state.SCB, _ = bitsandbytes.functional.int8_vectorwise_quant(
            weight_OC.to(old.device, torch.float16)
        )
        made._parameters["weight"] = bitsandbytes.nn.Int8Params(made.state.CB, requires_grad=False)
    elif type(old) is nn.Parameter and old.is_floating_point():
        same = weight_OC.to(old.device, old.dtype)
        made._parameters["weight"] = nn.Parameter(same, requires_grad=False)
    else:
        return None
    return made


def _computed(layer: Any, x_1NC: Tensor, dy_1NO: Tensor) -> list[Tensor]:
    """Return a layer's output and, where gradients are on, the gradient of its input."""
    grad = torch.is_grad_enabled()
    x_1NC.requires_grad_(grad)
    y_1NO = layer(x_1NC)
    found = [y_1NO.detach()]
    if grad:
        found += torch.autograd.grad(y_1NO, x_1NC, dy_1NO.to(y_1NO.dtype))
    return found
