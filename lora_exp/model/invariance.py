"""Products whose bits do not depend on how many rows they have, on a GPU.

Triton kernels of megatron-core, made for that, take the place of torch's. Their own switch also
wants Transformer Engine, so they are registered here (docs/decisions/0026).
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from lora_exp.errors import ConfigError

KEY = "batch_invariant"
KERNELS = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
PACKAGES = ("megatron-core", "triton")
CAPABILITY = (8, 0)  # the lowest with bfloat16
# of the products that they compute. In float32 a GPU would round to TF32, and many have too little
# shared memory for the blocks of float16; on a CPU Triton's interpreter has no bfloat16
DTYPES = {"CUDA": torch.bfloat16, "CPU": torch.float32}
_library: Any = None  # of the registrations, while they hold


def is_on() -> bool:
    """Return whether the kernels are in use."""
    return _library is not None


def versions() -> dict[str, str]:
    """Return the versions of the packages that have the kernels."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # or it is installed under another name
        return "unknown"


def start() -> None:
    """Use the kernels in this process from now on.

    Raises:
        ConfigError: there is no GPU that can run them, or no package that has them.
    """
    global _library
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    if device == "CPU" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError([(KEY, "its kernels need a GPU; leave it out")])
    if device == "CUDA" and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        text = (
            "its kernels need a GPU of compute capability {}.{}, and this has {}.{}; leave it out"
        )
        raise ConfigError([(KEY, text.format(*CAPABILITY, *found))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kernels = import_module(KERNELS)
        except ImportError as error:
            text = f"its kernels cannot be imported: {error}"
            raise ConfigError(
                [(KEY, f'{text}; pip install "lora-exp[batch-invariant]"')]
            ) from error
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        dtype = DTYPES[device]
        library.impl("mm", _product(kernels.mm_batch_invariant, dtype), device)
        library.impl("addmm", _product_with_bias(kernels.addmm_batch_invariant, dtype), device)
        if device == "CUDA":  # the kernel refuses other tensors
            library.impl("mean.dim", _mean(kernels.mean_batch_invariant), device)
    _library = library


def stop() -> None:
    """Use torch's own products again."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _product(kernel: Any, dtype: torch.dtype) -> Any:
    def mm(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == b.dtype == dtype and a.numel() and b.numel():
            return kernel(a, b)  # type: ignore[no-any-return]
        return torch.mm(a, b, out=a.new_empty(0))  # another operator, and torch's own

    return mm


def _product_with_bias(kernel: Any, dtype: torch.dtype) -> Any:
    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        # the kernel reads as many numbers as there are columns, one after the other
        is_row = bias.shape == b.shape[1:] and bias.is_contiguous()
        has_rows = a.numel() and b.numel() and beta == alpha == 1
        if is_row and has_rows and bias.dtype == a.dtype == b.dtype == dtype:
            return kernel(bias, a, b)  # type: ignore[no-any-return]
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))

    return addmm


def _mean(kernel: Any) -> Any:
    def mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        # the kernel adds in the dtype of its input, and counts numbers in 32 bits
        is_one = dim is not None and len(dim) == 1 and -x.dim() <= dim[0] < x.dim()
        is_one = is_one and 0 < x.numel() < 2**31
        if is_one and x.dtype == torch.float32 and dtype in (None, torch.float32):
            return kernel(x, list(dim), keepdim)  # type: ignore[no-any-return]
        out = x.new_empty(0, dtype=dtype or x.dtype)
        return torch.mean(x, dim, keepdim, dtype=dtype, out=out)

    return mean
