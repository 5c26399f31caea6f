"""What can be computed together without changing a bit, and what cannot: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_exp.lockstep.linear import split
from lora_exp.lockstep.state import RandomState


def unfusable(model: Any) -> str | None:
    """Say why jobs on this base cannot share a pass; None where they can."""
    body, config = model.base_model, model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or not body._supports_attention_backend:
        return f"its attention is {config._attn_implementation}, not sdpa"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "its attention slides"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ({rope}) depends on the longest row"
    if getattr(config, "attention_dropout", 0) or any(
        isinstance(m, nn.Dropout) and m.p for m in body.modules()
    ):
        return "it has dropout of its own"
    for module in body.modules():
        known = isinstance(module, nn.Linear | nn.Embedding) or "Norm" in type(module).__name__
        if not known and list(module.parameters(recurse=False)):
            return f"{type(module).__name__} has weights that are no linear layer's"
    return None


def foreign(model: Any) -> str | None:
    """Say what of a model's adapter cannot take part in a pass; None where all can."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return f"{name} is adapted by {type(module).__name__}"
        if isinstance(module, LoraLayer):
            if not isinstance(module.get_base_layer(), nn.Linear):
                return f"{name} is no linear layer"
            if module.lora_variant:
                return f"{name} has {type(next(iter(module.lora_variant.values()))).__name__}"
    return None


@contextmanager
def keeping_random() -> Iterator[None]:
    """Draw random numbers that nobody notices."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()


def rows_alike(linear: Any, dtype: torch.dtype, grad: bool) -> float:
    """Measure from how many rows on a product is the same, bit for bit, alone and among others.

    With outliers, which 8-bit products treat by the column of the whole; backward too with `grad`.

    Returns:
        The least number of rows; infinity where the others always show.
    """
    found, device = math.inf, linear.weight.device
    for least in (64, 16, 1):
        sizes = [least, least + 1, 3 * least + 5, least, 150 + least, 2 * least + 1]
        sizes += [900] if least == 64 else []
        x_1NC = torch.randn(1, sum(sizes), linear.in_features, device=device, dtype=dtype)
        x_1NC[:, :: 2 * least + 3, ::7] *= 20
        dy_1NC = torch.randn(1, sum(sizes), linear.out_features, device=device, dtype=dtype)
        y_1NC, dx_1NC = _product(linear, x_1NC, dy_1NC, grad)
        parts = (split(t, sizes) for t in (x_1NC, dy_1NC, y_1NC, dx_1NC))
        for x, dy, y, dx in zip(*parts, strict=True):
            alone = _product(linear, x, dy, grad)
            if not (torch.equal(alone[0], y) and torch.equal(alone[1], dx)):
                return found
        found = least
    return found


def _product(linear: Any, x: Tensor, dy: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(grad):
        x = x.detach().requires_grad_(grad)
        y: Tensor = linear(x)
        dx = torch.autograd.grad(y, x, dy.to(y.dtype))[0] if grad else x
    return y.detach(), dx
