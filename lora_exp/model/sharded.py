"""Weights that are shared out among the processes of a run: FSDP2, of torch.

Each process keeps its part of every layer's weights. A layer is gathered when a forward or backward
pass comes to it, and its other parts are freed behind it, so all processes make the same passes in
the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_exp.errors import ConfigError
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


def share_weights(model: Any) -> None:
    """Leave this process its part of all weights of a model, which may train.

    Args:
        model: a whole one, on the CPU.

    Raises:
        ConfigError: it is quantised, or does not say which modules are its layers.
    """
    from torch.distributed.fsdp import fully_shard

    layers, mesh = _layers(model), _mesh()
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # embeddings and head, freed behind a forward pass, too: none may be left whole by an evaluation
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for tensor in model.buffers():
        tensor.data = tensor.data.to(device())
    model._is_fsdp_managed_module = True


def gathered(model: Any) -> dict[str, Tensor]:
    """Return the whole weights of a model after `share_weights`; all processes call it together.

    Returns:
        On the CPU, of tied ones the first; in other processes than the first it is empty.
    """
    from transformers.distributed import gather_full_state_dict

    weights = gather_full_state_dict(model)
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    return {name: tensor for name, tensor in weights.items() if name in names}


def from_whole(model: Any, weights: dict[str, Any]) -> Any:
    """Take this process's part of whole weights.

    Returns:
        torch's `missing_keys` and `unexpected_keys`.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    return set_model_state_dict(model, weights, options=options)


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is shared out; of another all."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor, whose module takes a second
    return tensor if to_local is None else to_local()


def part_of(parameter: Tensor, part: Any) -> Any:
    """Return this process's part of a tensor that is shared out as a parameter is.

    Args:
        parameter: it.
        part: of the size of its part; anything else is returned as it is.
    """
    from torch.distributed.tensor import DTensor

    if getattr(part, "shape", None) != own_part(parameter).shape:
        return part
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part.to(parameter.device), parameter.device_mesh, parameter.placements,
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
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        text = f"{type(base).__name__} does not say which modules are its layers; parallel=ddp"
        raise ConfigError([("model.path", text)])
    return layers
