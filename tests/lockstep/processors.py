"""Products as other processors compute them: by the number of rows, or by a row's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LINEAR = nn.functional.linear
Product = Callable[..., Tensor]


class Halves(torch.autograd.Function):
    """A product whose sums, also those of its gradients, are those of two halves.

    They are summed in float32 and rounded at the end, as processors do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = summed(x, weight.T)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, dy_NO = x.reshape(-1, x.shape[-1]), dy[0].reshape(-1, weight.shape[0])
        dw = dy_NO.T @ rows if ctx.needs_input_grad[1] else None
        return summed(dy[0], weight), dw, None


def summed(x: Tensor, weight: Tensor) -> Tensor:
    k = x.shape[-1] // 2
    with torch.autocast("cpu", enabled=False):
        one, other = x[..., :k].float(), x[..., k:].float()
        return (one @ weight[:k].float() + other @ weight[k:].float()).to(x.dtype)


def in_halves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a product by halves, in the dtype that autocast asks for."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    out: Tensor = Halves.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def banded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add in another order between 37 and 191 rows (as AMX does in bfloat16, 512 to 192)."""
    between = 37 <= x.numel() // x.shape[-1] <= 191
    return (in_halves if between else LINEAR)(x, weight, bias)


def combed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add in another order in narrow bands (as AMX does in bfloat16, 192 to 512 backward)."""
    between = 9 <= x.numel() // x.shape[-1] % 32 <= 12
    return (in_halves if between else LINEAR)(x, weight, bias)


def placed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add in another order in the rows that the last eight-row block is short of."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = len(rows) // 8 * 8
    parts = LINEAR(rows[:blocks], weight, bias), in_halves(rows[blocks:], weight, bias)
    return torch.cat(parts).view(*x.shape[:-1], weight.shape[0])


class Processed(nn.Linear):
    """A linear layer with a product of its own, summed in float32 and rounded to bfloat16."""

    def __init__(self, product: Product, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.bfloat16)
        self.requires_grad_(False)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.float(), self.weight.float()).to(x.dtype)


@contextmanager
def processor(product: Product) -> Iterator[None]:
    """Have every linear layer, those of adapters too, compute as another processor would."""
    functional: Any = nn.functional
    functional.linear = product
    try:
        yield
    finally:
        functional.linear = LINEAR
