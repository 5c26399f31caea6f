"""Bytes of a base's weights, quantised as by bitsandbytes, without the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_exp.model.experts import stacks
from lora_exp.model.quantised import skipped

BLOCK, OUTER_BLOCK = 64, 256  # weights for each 4-bit scale, and scales for each scale of scales


def base_bytes(model: Any, quant: Mapping[str, Any] | None) -> int:
    """Return the bytes of a model's weights, quantised as by bitsandbytes.

    Args:
        model: its weights may be on the meta device.
        quant: the section of the config; None: the weights are not quantised.
    """
    tensors = (*model.parameters(), *model.buffers())
    total = int(sum(t.numel() * t.element_size() for t in tensors))
    if quant is None:
        return total
    weights = [model.get_parameter(name) for name in _quantised_weights(model, quant)]
    floats = int(sum(weight.numel() * weight.element_size() for weight in weights))
    return total - floats + sum(_quantised_bytes(weight, quant) for weight in weights)


def _quantised_weights(model: Any, quant: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the weights that bitsandbytes quantises: of layers, and of experts."""
    not_quantised = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    not_quantised += skipped(model, quant.get("skip_modules") or ())
    for name, module in model.named_modules():
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if linear and should_convert_module(name, not_quantised):
            yield f"{name}.weight"
    for name in stacks(model) if quant.get("experts") else ():
        if should_convert_module(name.rpartition(".")[0], not_quantised):
            yield name


def stacks_in_4_bits(model: Any, quant: Mapping[str, Any] | None) -> set[str]:
    """Return the names of the stacks of experts that are quantised."""
    return stacks(model).keys() & {*(_quantised_weights(model, quant) if quant else ())}


def dequantised_bytes(model: Any, quant: Mapping[str, Any] | None) -> int:
    """Return the bytes of the experts of one layer, the largest: they are dequantised together."""
    layers = Counter[str]()
    for name in stacks_in_4_bits(model, quant):
        stack = model.get_parameter(name)
        layers[name.rpartition(".")[0]] += stack.numel() * stack.element_size()
    return max(layers.values(), default=0)


def _quantised_bytes(weight: Any, quant: Mapping[str, Any]) -> int:
    """Return the bytes of a quantised weight [O, I] or [E, ...], and of its scales."""
    count = int(weight.numel())
    if "quant_type" not in quant:
        return count + 4 * len(weight)  # int8, and a scale for each row
    scales = math.ceil(count / BLOCK)
    if quant["double_quant"]:
        return count // 2 + scales + 4 * math.ceil(scales / OUTER_BLOCK)
    return count // 2 + 4 * scales
