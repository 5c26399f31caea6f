"""A probe: a layer and rows whose sums would be nearly zero but for the order in which they add up.

A random sum hides that order: bfloat16 products are added up in float32 and rounded at the end, so
another order shows in about one of ten thousand results. Here the terms cancel in pairs that lie
far apart, and what is left is rounding. Shapes: N rows; C channels in, O out; H heads, D head size.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

DISTINCT = 4  # rows that a layer without a weight to choose is tried with
COUNTS = (2, 40, 150)  # of rows, among which the first must not depend on the others
SPREAD = 12  # powers of two, either way, over which the terms of a sum are spread
LARGEST = 0.7391  # of a weight; no power of two, so that products are rounded
BLOCK = 64  # weights that 4-bit quantisation scales together


class Probe:
    """What tells which numbers of rows a layer computes with the same bits."""

    def __init__(
        self, layer: Any, shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool = False
    ) -> None:
        """Make a probe of a layer as it computes now: in the gradient and autocast modes set.

        Args:
            layer: works on each row by itself; its weights are left alone.
            shape: of one row, (C,) or (H, D).
            dtype: of the rows.
            heads_first: whether the layer takes [1, H, N, D] instead of [1, N, H, D].
        """
        g = torch.Generator().manual_seed(0)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        self.layer: Any = layer
        self.heads_first = heads_first
        self.remainder: Tensor | None = None  # what sums that are exact would leave
        if isinstance(layer, nn.Linear):
            x_C, columns = _cancelling(layer.in_features, g)
            y_O, rows = _cancelling(layer.out_features, g)
            drawn = LARGEST * (2 * torch.rand(len(y_O), len(x_C), generator=g) - 1)
            scaling = columns[::BLOCK]  # one in each block is the largest: all scale alike
            drawn[:, scaling] = LARGEST * drawn[:, scaling].sign()
            self.layer = _holding(layer, drawn[rows][:, columns], g)
            self.rows = [x_C.to(device, dtype)]
            self.gradients = [y_O.to(device)]
            bias = self.layer.bias if self.layer is not None else None
            self.remainder = bias if bias is not None else torch.zeros((), device=device)
        else:
            drawn = torch.randn(2, DISTINCT, *shape, generator=g).to(device)
            self.rows, self.gradients = [x.to(dtype) for x in drawn[0]], [*drawn[1]]
            if "Norm" in type(layer).__name__:  # which sums squares, and in float32
                absorbed = [_absorbing(shape, g).to(device) for _ in range(DISTINCT - 1)]
                self.rows = [self.rows[0], *absorbed]
        self.independent = self.layer is not None and self._independent(shape, dtype, device, g)

    def class_of(self, rows: int) -> str | None:
        """Return what a number of rows has in common with all that are computed alike.

        Returns:
            A hash; None where rows of this number do not all come out alike, depend on each other,
            or leave nothing by which their order could be told.
        """
        if not self.independent:
            return None
        digest = hashlib.sha256()
        for x, dy in zip(self.rows, self.gradients, strict=True):
            many = (t.expand(1, rows, *t.shape).contiguous() for t in (x, dy))
            for i, out in enumerate(self._computed(*many)):
                first = out[:, :1].contiguous()
                if not torch.equal(out, first.expand_as(out)) or self._blind(first, i):
                    return None
                digest.update(first.view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _blind(self, out: Tensor, direction: int) -> bool:
        """Say whether a product's sums (0) or its gradient's (1) came out exact."""
        if self.remainder is None:
            return False
        left = self.remainder.to(out.dtype) if direction == 0 else torch.zeros_like(out)
        return torch.equal(out, left.expand_as(out))

    def _independent(
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
        for count in COUNTS:
            drawn = torch.randn(3, 1, count, *shape, generator=g)
            drawn[1:, :, :, ..., ::3] *= 30
            drawn[:, :, 0] = drawn[0, :, 0]
            dy = torch.randn(1, count, *gradient.shape, generator=g).to(device)
            first, *others = (self._computed(x.to(device, dtype), dy) for x in drawn)
            pairs = (pair for other in others for pair in zip(first, other, strict=True))
            if not all(torch.equal(a[:, 0], b[:, 0]) for a, b in pairs):
                return False
        return True

    def _computed(self, x_1NC: Tensor, dy_1NO: Tensor) -> list[Tensor]:
        """Return a layer's output and, where gradients are on, the gradient of its input."""
        grad = torch.is_grad_enabled()
        x_1NC.requires_grad_(grad)
        if self.heads_first:
            y_1NO = self.layer(x_1NC.transpose(1, 2).contiguous()).transpose(1, 2)
        else:
            y_1NO = self.layer(x_1NC)
        computed = [y_1NO.detach()]
        if grad:
            computed += torch.autograd.grad(y_1NO, x_1NC, dy_1NO.to(y_1NO.dtype))
        return computed


def _cancelling(size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return values that cancel in pairs, and for each place the pair that it belongs to.

    They differ so much in size that a sum in float32 loses the small ones.
    """
    order = torch.randperm(size, generator=g)
    half = size // 2
    one, other = order[:half], order[half : 2 * half]
    values, pair_of = torch.zeros(size), torch.zeros(size, dtype=torch.long)
    exponent = torch.randint(-SPREAD, SPREAD + 1, (half,), generator=g)
    values[one] = (1 + torch.rand(half, generator=g)) * 2.0**exponent
    values[other] = -values[one]
    pair_of[one] = pair_of[other] = torch.arange(half)
    return values, pair_of


def _absorbing(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Return values whose squares are a one and many that vanish if each is added to it alone.

    Squares cannot cancel; but how many vanish in float32 hangs on the order of the sum.
    """
    values = 2.0**-12.5 * (1 - torch.rand(shape, generator=g) / 8)
    places = torch.randint(shape[-1], (*shape[:-1], 1), generator=g)
    return torch.scatter(values, -1, places, 1.0)


def _holding(layer: Any, weight_OC: Tensor, g: torch.Generator) -> Any:
    """Return a layer of the same kind and settings with another weight, quantised as its own.

    A bias becomes about as large as what rounding leaves of the sums: it shows whether it is added
    first or last, and hides nothing.

    Returns:
        None for a kind of weight that is not known.
    """
    made, old = copy.copy(layer), layer.weight
    made._parameters = dict(layer._parameters)
    if layer.bias is not None:
        small = 2.0**-SPREAD * torch.randn(layer.bias.shape, generator=g)
        bias = small.to(layer.bias.device, layer.bias.dtype)
        made._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
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
