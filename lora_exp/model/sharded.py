"""Weights that are shared out among the processes of a run: FSDP2, of torch.

Each process keeps its part of every layer's weights. A layer is gathered when a forward or backward
pass comes to it, and its other parts are freed behind it, so all processes make the same passes in
the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_exp.errors import ConfigError
from lora_exp.model.mixture import expert_count
from lora_exp.model.placement import device
from lora_exp.model.precision import is_quantised
from lora_exp.parallel.world import world


def share_layers(model: Any) -> None:
    """Leave this process its part of the frozen weights in a model's layers.

    Adapters, embeddings and the head stay whole.

    Args:
        model: with an adapter, on the CPU; all but the layers goes to the device as it is.

    Raises:
        ConfigError: the base is quantised, or does not say which modules are its layers.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    base = model.get_base_model()
    layers, mesh = _layers(base), _mesh()
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
    # with nothing of its own to share: under it the layers are parts of one pass
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device())
    base._is_fsdp_managed_module = True  # transformers then generates in step
    shared = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    left_to_fsdp = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    left_to_fsdp(model, shared)  # type: ignore[no-untyped-call]


def share_weights(model: Any, computed_in: torch.dtype | None = None) -> None:
    """Leave this process its part of all weights of a model, which may train.

    Args:
        model: a whole one, on the CPU.
        computed_in: the 16-bit dtype of products: a layer is gathered in it, since autocast would
            keep a copy of each weight until the backward pass. None: that of the weights, as for a
            model that says which of its weights have to be float32.

    Raises:
        ConfigError: it is quantised, does not say which modules are its layers, or has weights that
            torch cannot share out.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = _layers(model)
    _check_parts(model, layers)
    mesh = _mesh()
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        computed_in = None  # rounded, they would compute something else
    policy = MixedPrecisionPolicy(
        param_dtype=computed_in, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # embeddings and head, freed behind a forward pass, too: none may be left whole by an evaluation
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for tensor in model.buffers():
        tensor.data = tensor.data.to(device())
    if expert_count(model.config) is not None:  # each process may have used others
        model.set_reduce_scatter_unused_params(True)
    model._is_fsdp_managed_module = True


def _check_parts(model: Any, layers: list[Any]) -> None:
    """Refuse what torch would refuse in the first pass: each part has one dtype and own weights."""
    owner: dict[Any, Any] = {}
    for layer in layers:
        for parameter in layer.parameters():
            if owner.setdefault(parameter, layer) is not layer:
                text = f"two layers of {type(model).__name__} share a weight; parallel=ddp"
                raise ConfigError([("model.path", f"fsdp: {text}")])
    within = {module for layer in layers for module in layer.modules()}
    apart = [module for module in model.modules() if module not in within]
    if any(p in owner for module in apart for p in module.parameters(recurse=False)):
        text = f"a weight of {type(model).__name__} is in a layer and elsewhere; parallel=ddp"
        raise ConfigError([("model.path", f"fsdp: {text}")])
    if any(not parameter.dim() for parameter in model.parameters()):
        text = f"{type(model).__name__} has a weight that is one number; parallel=ddp"
        raise ConfigError([("model.path", f"fsdp: {text}")])
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(dtypes) > 1:
        text = f"fsdp shares out weights of one dtype, and these are {' and '.join(sorted(dtypes))}"
        raise ConfigError([("model.dtype", f"{text}; give float32")])


def gathered(model: Any) -> dict[str, Tensor]:
    """Return the whole weights of a model after `share_weights`; all processes call it together.

    Returns:
        On the CPU, a tied weight once; in other processes than the first it is empty.
    """
    from transformers.distributed import gather_full_state_dict

    weights = gather_full_state_dict(model)
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    return {name: tensor for name, tensor in weights.items() if name in names}


class Loaded(NamedTuple):
    """The names in which a model and saved weights differ."""

    missing_keys: list[str]  # in the saved ones
    unexpected_keys: list[str]


def from_whole(model: Any, weights: dict[str, Any]) -> Loaded:
    """Take each process's part of the first one's whole weights; all processes call it together.

    Args:
        model: after `share_weights`.
        weights: those of the first process; of others they are not read.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    names = set(model.state_dict())
    differing = sorted(names - set(weights)), sorted(set(weights) - names)
    result = Loaded(*world.shared(differing))  # torch does not say which are missing
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights if world.is_first else {}, options=options)
    return result


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is shared out; of another all."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor; to import its class takes a second
    return tensor if to_local is None else to_local()


def part_of(parameter: Tensor, value: Any) -> Any:
    """Return a value of an optimizer's state as it belongs to a parameter.

    Args:
        parameter: one that is shared out.
        value: this process's part of a mean of gradients, of the size of its part of the parameter;
            a number of steps, or anything else of another size, is returned as it is.
    """
    from torch.distributed.tensor import DTensor

    if getattr(value, "shape", None) != own_part(parameter).shape:
        return value
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        value.to(parameter.device), parameter.device_mesh, parameter.placements,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(device()).type, (world.size,))


def _layers(base: Any) -> list[Any]:
    """Return the modules that a base names as those which no device may have a part of."""
    if is_quantised(base):
        text = "is quantised, and fsdp cannot share its weights out; parallel=ddp"
        raise ConfigError([("model.path", text)])
    if getattr(base.config, "layerdrop", 0):
        text = f"{type(base).__name__} leaves layers out at random (layerdrop), each process others"
        raise ConfigError([("parallel", f"fsdp: {text}; parallel=ddp")])
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    within = {inner for layer in layers for inner in layer.modules() if inner is not layer}
    layers = [layer for layer in layers if layer not in within]
    if not layers:
        text = f"{type(base).__name__} does not say which modules are its layers; parallel=ddp"
        raise ConfigError([("model.path", text)])
    return layers
