"""Make a model's `train`, `zero_grad` and `parameters` faster: less repeated work in each step.

With an adapter a model has a thousand modules, and every walk over them takes a millisecond or two,
several times per step. The results stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any


def avoid_module_walks(model: Any) -> None:
    """Replace methods of a model about to be trained by ones that do not walk over all modules.

    `train` acts only if the mode changes; parameters are listed and counted once. The set of
    parameters must not change from here on.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    all_parameters = list(model.parameters())
    set_mode, count = model.train, base.num_parameters
    set_mode(model.training)  # a new adapter may be in another mode than its base

    def train(mode: bool = True) -> Any:
        return model if model.training is mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in all_parameters:
            parameter.grad = None

    def parameters(recurse: bool = True) -> Iterator[Any]:
        return iter(all_parameters)

    model.train, model.zero_grad, model.parameters = train, zero_grad, parameters
    base.num_parameters = cache(count)
