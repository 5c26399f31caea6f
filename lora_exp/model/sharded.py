"""A frozen base whose layers are shared out among the processes of a run: FSDP2, of torch.

Each process keeps its part of every layer's weights. A layer is gathered when a forward or backward
pass comes to it, and its other parts are freed behind it, so all processes make the same passes in
the same order. Adapters, embeddings and the head stay whole.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_exp.errors import ConfigError
from lora_exp.model.placement import device
from lora_exp.model.precision import is_quantised
from lora_exp.parallel.world import world


def share_layers(model: Any) -> None:
    """Leave this process its part of the frozen weights in a model's layers.

    Args:
        model: with an adapter, on the CPU; all but the layers goes to the device as it is.

    Raises:
        ConfigError: the base is quantised, or does not say which modules are its layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    base = model.get_base_model()
    layers = _layers(base)
    mesh = init_device_mesh(torch.device(device()).type, (world.size,))
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
