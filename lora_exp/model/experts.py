"""The routed experts of mixtures: where they are, and their stacks in 4 bits.

Most classes hold a layer's experts as stacked weights, which are no layers. bitsandbytes quantises
any weight, but transformers asks it for layers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

LARGEST = 2**31  # numbers of a weight


def expert_modules(model: Any) -> Iterator[str]:
    """Yield the modules that hold routed experts; shared experts are plain layers."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if ("Expert" in kind and "Shared" not in kind) or name.rpartition(".")[2] == "experts":
            yield name


def stacks(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes [E, ...] of the stacks of E experts, by the weights' names."""
    found = {}
    for name in expert_modules(model):
        module = model.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and "bias" not in key:
                found[f"{name}.{key}"] = tuple(parameter.shape)
        for key, stack in _in_4_bits(module).items():
            found[f"{name}.{key}"] = stack.shape
    return found


def quantised_stacks(model: Any) -> dict[str, Stack]:
    """Return the stacks that are held in 4 bits, by the weights' names."""
    return {
        f"{name}.{key}": stack
        for name, module in model.named_modules()
        for key, stack in _in_4_bits(module).items()
    }


def check_shape(name: str, saved: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a quantised weight of another shape: transformers compares those of floats only.

    Raises:
        ValueError: with both shapes.
    """
    if saved != expected:
        text = f"one of its weights has another size than its config.json says, {name}"
        raise ValueError(f"{text}: {[*saved]}, not {[*expected]}")


def dequantise_stacks(model: Any) -> None:
    """Replace the stacks that are held in 4 bits by floats."""
    for name in quantised_stacks(model):
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        floats = getattr(module, key)
        parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        setattr(module, key, nn.Parameter(floats, requires_grad=False))


@dataclass
class Floats:
    """The stacks of one module, dequantised; they are freed when those of another one are read.

    So experts that are computed one by one, and the jobs of a pack, dequantise a layer once.
    """

    module: str = ""
    stacks: dict[Stack, Tensor] = field(default_factory=dict)


class Stack(nn.Module):
    """A stack of experts [E, ...] in 4 bits: a parametrisation that dequantises it."""

    def __init__(self, quant_state: Any, module: str, floats: Floats) -> None:
        super().__init__()
        self.quant_state, self.shape = quant_state, tuple(quant_state.shape)
        # as one row: see `misread` of rows that are no whole blocks
        quant_state.shape = torch.Size([math.prod(self.shape)])
        self.module, self.floats = module, floats

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        """Return the floats, in the dtype of `quant_state`."""
        kept = self.floats
        if kept.module != self.module:
            kept.module, kept.stacks = self.module, {}
        value = kept.stacks.get(self)
        if value is None or value.dtype != self.quant_state.dtype:
            value = functional.dequantize_4bit(packed, self.quant_state).view(self.shape)
            kept.stacks[self] = value
        return value

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a view of the floats that are kept."""
        kept = self.floats.stacks.get(self)
        if kept is None or tensor.dtype != kept.dtype:
            return False
        return kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _in_4_bits(module: Any) -> dict[str, Stack]:
    lists = getattr(module, "parametrizations", {})
    found = {key: parametrisations[0] for key, parametrisations in lists.items()}
    return {key: stack for key, stack in found.items() if isinstance(stack, Stack)}


class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' quantiser to 4 bits; with `experts` in its config, of their stacks too.

    A stack is quantised as soon as it has been read, so that one at a time is in floats.
    """

    stacks: Mapping[str, tuple[int, ...]] = {}  # the shapes of those that are quantised

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight is to be quantised."""
        of_layer: bool = super().param_needs_quantization(model, param_name, **kwargs)
        return of_layer or param_name in self.stacks

    def get_quantize_ops(self) -> Any:
        """Return what quantises a weight that was read."""
        return _Quantise(self, super().get_quantize_ops())

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        if getattr(self.quantization_config, "experts", False) and not self.pre_quantized:
            self.stacks = {
                name: shape
                for name, shape in stacks(model).items()
                if should_convert_module(_parts(name)[0], self.modules_to_not_convert)
            }
        if large := [name for name, shape in self.stacks.items() if math.prod(shape) >= LARGEST]:
            text = f"bitsandbytes counts numbers in 32 bits, and {large[0]} has more"
            raise ValueError(f"{text}; quant.experts=false leaves experts in floats")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        floats = Floats()
        for name, shape in sorted(self.stacks.items()):
            module_name, key = _parts(name)
            module = model.get_submodule(module_name)
            packed = getattr(module, key)
            state = getattr(packed, "quant_state", None)
            if state is None:  # the files lack it, and their reader will say so
                continue
            check_shape(name, tuple(state.shape), shape)
            if not _in_4_bits(module):
                module.register_forward_pre_hook(_begin_saving)
                module.register_forward_hook(_end_saving, always_call=True)
            stack = Stack(state, module_name, floats)
            parametrize.register_parametrization(module, key, stack, unsafe=True)
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Quantise(ConversionOps):  # type: ignore[misc]
    """Quantises a stack, or leaves a layer's weight to transformers."""

    def __init__(self, quantizer: Quantizer, of_layers: ConversionOps) -> None:
        self.hf_quantizer, self.of_layers = quantizer, of_layers

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the quantised weights, by their names."""
        config = self.hf_quantizer.quantization_config
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            if name not in self.hf_quantizer.stacks:
                result |= self.of_layers.convert({name: value}, **kwargs)
                continue
            stack = value[0] if isinstance(value, list) else value
            packed, state = functional.quantize_4bit(
                stack,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
            )
            result[name] = nn.Parameter(packed, requires_grad=False)
            result[name].quant_state = state  # where bitsandbytes keeps it
        return result


AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Quantizer


def _parts(name: str) -> tuple[str, str]:
    module, _, key = name.rpartition(".")
    return module, key


def _begin_saving(module: Any, _: Any) -> None:
    """Let the forward save its quantised stacks for the backward as they are: in 4 bits.

    Others' hooks, as of checkpointed layers or of activations in the CPU's memory, see the rest.
    """
    in_4_bits = _in_4_bits(module)  # none once they are dequantised
    if in_4_bits and torch.is_grad_enabled():
        own = {stack: module.parametrizations[key].original for key, stack in in_4_bits.items()}
        others: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack, unpack = others or (_as_it_is, _as_it_is)
        hooks = saved_tensors_hooks(partial(_pack, own, pack), partial(_unpack, unpack))
        module.saving_in_4_bits = hooks
        hooks.__enter__()


def _end_saving(module: Any, *_: Any) -> None:
    if saving := module.__dict__.pop("saving_in_4_bits", None):
        saving.__exit__()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class _Saved:
    """A view of a stack, as it is saved for the backward."""

    stack: Stack
    packed: Tensor
    view: tuple[Any, ...]  # size, stride and offset


def _pack(own: dict[Stack, Tensor], others: Callable[[Tensor], Any], tensor: Tensor) -> Any:
    for stack, packed in own.items():
        if stack.holds(tensor):
            view = tensor.size(), tensor.stride(), tensor.storage_offset()
            return _Saved(stack, packed, view)
    return others(tensor)


def _unpack(others: Callable[[Any], Tensor], saved: Any) -> Tensor:
    if not isinstance(saved, _Saved):
        return others(saved)
    floats: Tensor = saved.stack(saved.packed)
    return floats.as_strided(*saved.view)
