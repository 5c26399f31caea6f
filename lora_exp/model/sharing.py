"""Several models over the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lora_exp.model.experts import quantised_stacks


def sharing_copy(model: Any) -> Any:
    """Copy the tree of modules, not the tensors: weights and quantisation states are the originals.

    8-bit layers move their weights' scales when first used: here this is done before the copy.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers(), *quantised_stacks(model).values()]
    for module in model.modules():
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        shared += [t for t in vars(state).values() if isinstance(t, torch.Tensor)] if state else []
        weight = getattr(module, "weight", None)
        states = (getattr(owner, "quant_state", None) for owner in (module, weight))
        shared += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(x): x for x in shared})
