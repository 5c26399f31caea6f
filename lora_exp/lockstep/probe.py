"""A probe: a layer and rows whose exact sums are about zero, so that only rounding errors remain.

Rounding errors show the order of addition. Random rows hide it: bfloat16 products are added in
float32 and rounded at the end, so another order shows in about one of ten thousand results. Here
the terms cancel in pairs that lie far apart.

Shapes: N rows; C channels in, O out; H heads, D head size.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_exp.lockstep.products import APART

DISTINCT = 4  # different rows, for a layer whose weight the probe does not choose
COUNTS = (2, 40, 150)  # numbers of rows with which independence of rows is tested
SPREAD = 12  # the terms of a sum are from 2^-12 to 2^12
LARGEST = 0.7391  # weight; not a power of two, so that products are rounded
BLOCK = 64  # weights that share a scale in 4-bit quantisation


class Probe:
    """Measures which numbers of rows a layer computes with the same bits."""

    def __init__(
        self, layer: Any, shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool = False
    ) -> None:
        """Create a probe of a layer in the gradient and autocast modes that are set now.

        Args:
            layer: computes each row by itself; its weights are not changed.
            shape: of one row, (C,) or (H, D).
            dtype: of the rows.
            heads_first: whether the layer takes [1, H, N, D] instead of [1, N, H, D].
        """
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        self.layer: Any = layer
        self.heads_first = heads_first
        self.remainder: Tensor | None = None  # the output if all sums were exact
        if isinstance(layer, nn.Linear | Conv1D):
            outputs, inputs = _sizes(layer)
            x_C, columns = _cancelling(inputs, generator)
            y_O, rows = _cancelling(outputs, generator)
            drawn = LARGEST * (2 * torch.rand(len(y_O), len(x_C), generator=generator) - 1)
            scaling = columns[::BLOCK]  # one weight in each block is the largest: equal scales
            drawn[:, scaling] = LARGEST * drawn[:, scaling].sign()
            self.layer = _with_weight(layer, drawn[rows][:, columns], generator)
            self.rows = [x_C.to(device, dtype)]
            self.gradients = [y_O.to(device)]
            bias = self.layer.bias if self.layer is not None else None
            self.remainder = bias if bias is not None else torch.zeros((), device=device)
        else:
            drawn = torch.randn(2, DISTINCT, *shape, generator=generator).to(device)
            self.rows, self.gradients = [x.to(dtype) for x in drawn[0]], [*drawn[1]]
            if "Norm" in type(layer).__name__:  # a norm sums squares, in float32
                absorbed = [_absorbing(shape, generator).to(device) for _ in range(DISTINCT - 1)]
                self.rows = [self.rows[0], *absorbed]
        self.independent = self.layer is not None and self._independent(
            shape, dtype, device, generator
        )

    def class_of(self, rows: int) -> str | None:
        """Return the class of a number of rows: equal for numbers computed with the same bits.

        Returns:
            A hash; `APART` if equal rows give unequal results, or if no rounding error shows the
            order; None if rows depend on each other, or the layer is not known.
        """
        if not self.independent:
            return None
        digest = hashlib.sha256()
        for x, dy in zip(self.rows, self.gradients, strict=True):
            repeated = (t.expand(1, rows, *t.shape).contiguous() for t in (x, dy))
            for i, out in enumerate(self._computed(*repeated)):
                first = out[:, :1].contiguous()
                if not torch.equal(out, first.expand_as(out)) or self._has_no_rounding_error(
                    first, i
                ):
                    return APART
                digest.update(first.view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _has_no_rounding_error(self, out: Tensor, direction: int) -> bool:
        """Return whether there is no rounding error in the output (0) or the gradient (1)."""
        if self.remainder is None:
            return False
        remainder = self.remainder.to(out.dtype) if direction == 0 else torch.zeros_like(out)
        return torch.equal(out, remainder.expand_as(out))

    def _independent(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> bool:
        """Return whether the result of a row is independent of the other rows.

        8-bit layers detect outliers over all rows, so some columns get large values.
        """
        gradient = self.gradients[0]
        for count in COUNTS:
            drawn = torch.randn(3, 1, count, *shape, generator=generator)
            drawn[1:, :, :, ..., ::3] *= 30
            drawn[:, :, 0] = drawn[0, :, 0]
            dy = torch.randn(1, count, *gradient.shape, generator=generator).to(device)
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
            with torch.autocast(x_1NC.device.type, enabled=False):  # as backward of a run
                computed += torch.autograd.grad(y_1NO, x_1NC, dy_1NO.to(y_1NO.dtype))
        return computed


def _sizes(layer: Any) -> tuple[int, int]:
    """Return how many channels a linear layer has out and in."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def _cancelling(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return values that cancel in pairs, and for each value the number of its pair.

    They differ so much in size that a float32 sum loses the small ones.
    """
    order = torch.randperm(size, generator=generator)
    half = size // 2
    one, other = order[:half], order[half : 2 * half]
    values, pair_of = torch.zeros(size), torch.zeros(size, dtype=torch.long)
    exponent = torch.randint(-SPREAD, SPREAD + 1, (half,), generator=generator)
    values[one] = (1 + torch.rand(half, generator=generator)) * 2.0**exponent
    values[other] = -values[one]
    pair_of[one] = pair_of[other] = torch.arange(half)
    return values, pair_of


def _absorbing(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return values whose squares are one 1 and many so small that 1 plus one of them is 1.

    Squares cannot cancel; but how many are lost in float32 depends on the order of the sum.
    """
    values = 2.0**-12.5 * (1 - torch.rand(shape, generator=generator) / 8)
    places = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    return torch.scatter(values, -1, places, 1.0)


def _with_weight(layer: Any, weight_OC: Tensor, generator: torch.Generator) -> Any:
    """Return a copy of a layer with another weight, quantised like the layer's own.

    A bias becomes about as large as the rounding errors: it shows whether it is added first or
    last, and does not hide them.

    Returns:
        None if the type of weight is not supported.
    """
    copied, weight = copy.copy(layer), layer.weight
    copied._parameters = dict(layer._parameters)
    if layer.bias is not None:
        small = 2.0**-SPREAD * torch.randn(layer.bias.shape, generator=generator)
        bias = small.to(layer.bias.device, layer.bias.dtype)
        copied._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        data, copied.quant_state = bitsandbytes.functional.quantize_4bit(
            weight_OC.to(weight.device, state.dtype),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,
        )
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(weight, name) for name in names}
        copied._parameters["weight"] = bitsandbytes.nn.Params4bit(
            data, quant_state=copied.quant_state, bnb_quantized=True, **settings
        )
    elif isinstance(weight, bitsandbytes.nn.Int8Params):
        copied.state = copy.copy(layer.state)
        copied.state.CB, copied.state.SCB, _ = bitsandbytes.functional.int8_vectorwise_quant(
            weight_OC.to(weight.device, torch.float16)
        )
        copied._parameters["weight"] = bitsandbytes.nn.Int8Params(
            copied.state.CB, requires_grad=False
        )
    elif type(weight) is nn.Parameter and weight.is_floating_point():
        converted = weight_OC.to(weight.device, weight.dtype)
        converted = converted.T.contiguous() if isinstance(layer, Conv1D) else converted
        copied._parameters["weight"] = nn.Parameter(converted, requires_grad=False)
    else:
        return None
    return copied
