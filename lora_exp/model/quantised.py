"""A quantised base: what stays in floats, how much of it is quantised, and back to floats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import torch
from bitsandbytes import functional
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging

from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.model.experts import Stack, check_shape, dequantise_stacks, quantised_stacks
from lora_exp.model.prequantised import forget_quantisation


def skip(
    quantization: BitsAndBytesConfig | None, model_class: Any, config: Any, trust_remote_code: bool
) -> None:
    """Add the output heads to the modules that stay in floats: transformers would forget them.

    Args:
        quantization: with `quant.skip_modules`; changed in place.
        model_class: an auto class.
        config: the base's.
        trust_remote_code: whether code that came with it may run.

    Raises:
        ConfigError: no module has one of the names.
    """
    if quantization is None or not quantization.llm_int8_skip_modules:
        return
    with torch.device("meta"):
        skeleton = model_class.from_config(config, trust_remote_code=trust_remote_code)
    names = skipped(skeleton, quantization.llm_int8_skip_modules)
    quantization.llm_int8_skip_modules = sorted({*names, *get_keys_to_not_convert(skeleton)})


def skipped(model: Any, names: Sequence[str]) -> set[str]:
    """Return the whole names of the modules that stay in floats; all below them do, too.

    Args:
        model: its weights may be on the meta device.
        names: of `quant.skip_modules`: whole, or the last parts.

    Raises:
        ConfigError: no module has one of the names.
    """
    known, whole = [name for name, _ in model.named_modules()], set()
    for name in names:
        found = {module for module in known if f".{module}".endswith(f".{name}")}
        if not found:
            text = f"no module of {type(model).__name__} is called {name!r}"
            near = did_you_mean(name, {module.rpartition(".")[2] for module in known})
            raise ConfigError([("quant.skip_modules", f"{text}{near}")])
        whole |= found
    return whole


def quantised_share(model: Any) -> tuple[float, str] | None:
    """Return the share of the layers' weights that is held in 4 or 8 bits, and what is not.

    bitsandbytes leaves classes other than nn.Linear alone. Embeddings, output heads and vectors
    (biases, norms) are no layers' weights.

    Args:
        model: the base, just loaded.

    Returns:
        From 0 to 1; the names of the largest weights that are floats, most first. None: the base
        is not quantised by bitsandbytes.

    Raises:
        ConfigError: nothing is quantised.
        ValueError: a layer has another shape than its class.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return None
    quantised, floats = 0, Counter[str]()
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(module is head for head in heads):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or key.endswith("bias"):
                continue
            stack = module[0] if isinstance(module, ParametrizationList) else None
            if isinstance(stack, Stack):
                quantised += math.prod(stack.shape)
            elif parameter.is_floating_point():
                last = name.rpartition(".")[2]
                floats[last if key == "weight" else f"{last}.{key}"] += parameter.numel()
            else:  # packed: two weights of 4 bits are a byte
                shape = module.out_features, module.in_features
                saved = getattr(parameter, "quant_state", None) or parameter
                check_shape(f"{name}.{key}", tuple(saved.shape), shape)
                quantised += math.prod(shape)
    in_floats = ", ".join(name for name, _ in floats.most_common(4))
    if not quantised:
        text = f"bitsandbytes quantises no layer of {type(model).__name__} ({in_floats})"
        raise ConfigError([("quant", f"{text}; give quant=none (--quant none)")])
    return quantised / (quantised + floats.total()), in_floats


def quantised_module(model: Any, names: Iterable[str]) -> str | None:
    """Return the first module of some names that has quantised weights; None: they have none.

    Args:
        model: the base.
        names: whole, or the last parts.
    """
    ends = tuple(f".{name}" for name in names)
    for name, module in model.named_modules():
        if f".{name}".endswith(ends) and not all(
            p.is_floating_point() for p in module.parameters()
        ):
            return str(name)
    return None


def misread(model: Any) -> str | None:
    """Return a warning if bitsandbytes does not dequantise a layer as it has quantised it.

    Its kernel for processors with AVX-512 takes the scales of other blocks where a row is no whole
    number of blocks, of 64 weights: on other devices the layer has other weights.
    """
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or state.shape[-1] % state.blocksize == 0:
            continue
        as_one_row = copy(state)
        as_one_row.shape = torch.Size([math.prod(state.shape)])
        read, meant = (functional.dequantize_4bit(weight.data, s) for s in (state, as_one_row))
        if not torch.equal(read.flatten(), meant.flatten()):
            text = f"bitsandbytes misreads rows that are no whole blocks of 64 weights ({name})"
            return f"quant: {text} on this processor; elsewhere the base differs"
    return None


def dequantise(model: Any, dtype: torch.dtype) -> Any:
    """Replace a quantised model's layers by plain ones with the dequantised weights."""
    exact_products(model, dtype)
    dequantise_stacks(model)
    classes = {name: getattr(module, "source_cls", None) for name, module in model.named_modules()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the dtype that is requested here
    try:
        model = model.dequantize(dtype=dtype).to(dtype)
    finally:
        logging.set_verbosity(verbosity)
    for name in [name for name, original in classes.items() if original is Conv1D]:
        model.set_submodule(name, _conv1d(model.get_submodule(name)))
    forget_quantisation(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # peft reads these before it merges
    return model.requires_grad_(False)


def _conv1d(linear: nn.Linear) -> Any:
    """Return the layer that was transposed to be quantised, as GPT-2's: else no class reads it."""
    layer = Conv1D(linear.out_features, 0)
    layer.nx, layer.bias = linear.in_features, linear.bias
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    return layer


def exact_products(model: Any, dtype: torch.dtype) -> None:
    """Let 4-bit layers and experts dequantise their weights to this dtype, and multiply in it."""
    for stack in quantised_stacks(model).values():
        stack.quant_state.dtype = dtype
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
            module.compute_dtype, module.compute_type_is_set = dtype, True
