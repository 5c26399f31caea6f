"""Simulated processors, whose order of summation depends on the number or position of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LINEAR = nn.functional.linear
Product = Callable[..., Tensor]


class StridedProduct(torch.autograd.Function):
    """A product that sums every third term at a time, also in its gradients.

    No real processor sums in this order (some sum 512 channels in two halves). The terms are
    summed in float32 and rounded at the end, as processors do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = strided_matmul(x, weight.T)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, dy_NO = x.reshape(-1, x.shape[-1]), dy[0].reshape(-1, weight.shape[0])
        dw = dy_NO.T @ rows if ctx.needs_input_grad[1] else None
        return strided_matmul(dy[0], weight), dw, None


def strided_matmul(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        x_NK, w_KO = x.float(), weight.float()
        parts = (x_NK[..., i::3].contiguous() @ w_KO[i::3].contiguous() for i in range(3))
        return sum(parts, start=torch.zeros(())).to(x.dtype)


def strided_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum in another order, in the dtype that autocast asks for."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    out: Tensor = StridedProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def band_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum in another order for 37 to 191 rows (as AMX does in bfloat16, 512 to 192)."""
    between = 37 <= x.numel() // x.shape[-1] <= 191
    return (strided_linear if between else LINEAR)(x, weight, bias)


def narrow_bands_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum in another order in narrow bands (as AMX does in bfloat16, 192 to 512 backward)."""
    between = 9 <= x.numel() // x.shape[-1] % 32 <= 12
    return (strided_linear if between else LINEAR)(x, weight, bias)


def last_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum in another order in the last rows, those that do not fill a block of eight."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = len(rows) // 8 * 8
    parts = LINEAR(rows[:blocks], weight, bias), strided_linear(rows[blocks:], weight, bias)
    return torch.cat(parts).view(*x.shape[:-1], weight.shape[0])


class SequentialProduct(torch.autograd.Function):
    """A product that sums term after term, independent of this machine's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: bool, backward: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.order = backward
        return sequential_matmul(x, weight.T, forward)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return sequential_matmul(dy[0], weight, ctx.order), None, None, None


def sequential_matmul(x: Tensor, weight: Tensor, in_order: bool) -> Tensor:
    """Multiply and sum in float32, one term after the other, from either end."""
    y = x.new_zeros(*x.shape[:-1], weight.shape[1], dtype=torch.float32)
    for k in range(x.shape[-1]) if in_order else reversed(range(x.shape[-1])):
        y = y + x[..., k, None].float() * weight[k].float()
    return y.to(x.dtype)


class SimulatedLinear(nn.Linear):
    """A linear layer whose order of summation depends on the number or position of rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        in_band: Callable[[int], bool],
        *,
        backward_only: bool = False,
        by_place: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)
        self.requires_grad_(False)
        self.in_band, self.backward_only, self.by_place = in_band, backward_only, by_place

    def forward(self, x: Tensor) -> Tensor:
        if self.by_place:
            rows = x.shape[1] // 8 * 8  # the rows after these do not fill a block of eight
            parts = [self.product(x[:, :rows], True), self.product(x[:, rows:], False)]
            return torch.cat([part for part in parts if part.numel()], 1)
        return self.product(x, not self.in_band(x.shape[1]))

    def product(self, x: Tensor, in_order: bool) -> Tensor:
        forward = in_order or self.backward_only
        out: Tensor = SequentialProduct.apply(x, self.weight, forward, in_order)  # type: ignore[no-untyped-call]
        return out


@contextmanager
def simulated_processor(product: Product) -> Iterator[None]:
    """Replace the product of every linear layer, including those of adapters."""
    functional: Any = nn.functional
    functional.linear = product
    try:
        yield
    finally:
        functional.linear = LINEAR
