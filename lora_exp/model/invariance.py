"""Products whose bits do not depend on how many rows they have, on a GPU.

Triton kernels of megatron-core, made for that, take the place of torch's. Their own switch also
wants Transformer Engine, so they are registered here (docs/decisions/0026).
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lora_exp.errors import ConfigError

KERNELS = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
CAPABILITY = (8, 0)  # the lowest with bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels compute in
_library: Any = None  # of the registrations, while they hold


def is_on() -> bool:
    """Return whether the kernels are in use."""
    return _library is not None


def start() -> None:
    """Use the kernels in this process from now on.

    Raises:
        ConfigError: there is no GPU that can run them.
    """
    global _library
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "CPU" and not is_interpreted:
        raise ConfigError([("batch_invariant", "its kernels need a GPU; leave it out")])
    if device == "CUDA" and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        text = (
            "its kernels need a GPU of compute capability {}.{}, and this has {}.{}; leave it out"
        )
        raise ConfigError([("batch_invariant", text.format(*CAPABILITY, *found))])
    kernels = import_module(KERNELS)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        library.impl("mm", _product(kernels.mm_batch_invariant), device)
        library.impl("addmm", _product_with_bias(kernels.addmm_batch_invariant), device)
        if device == "CUDA":  # the interpreter has no such tensors
            library.impl("mean.dim", _mean(kernels.mean_batch_invariant), device)
    _library = library


def stop() -> None:
    """Use torch's own products again."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _product(kernel: Any) -> Any:
    def mm(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in DTYPES and a.numel() and b.numel():
            return kernel(a, b)  # type: ignore[no-any-return]
        return torch.mm(a, b, out=a.new_empty(0))  # another operator: torch's own

    return mm


def _product_with_bias(kernel: Any) -> Any:
    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        plain = bias.dim() == 1 and beta == alpha == 1 and a.numel() and b.numel()
        if plain and a.dtype in DTYPES:
            return kernel(bias, a, b)  # type: ignore[no-any-return]
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))

    return addmm


def _mean(kernel: Any) -> Any:
    def mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        if dim and x.dtype in DTYPES and dtype in (None, x.dtype) and x.numel():
            return kernel(x, list(dim), keepdim)  # type: ignore[no-any-return]
        out = x.new_empty(0, dtype=dtype or x.dtype)
        return torch.mean(x, dim, keepdim, dtype=dtype, out=out)

    return mean
