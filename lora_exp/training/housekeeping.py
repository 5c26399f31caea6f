"""Make a model's `train`, `zero_grad` and `parameters` faster: less repeated work in each step.

With an adapter a model has a thousand modules, and every walk over them takes a millisecond or two,
several times per step. The results stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any


def spare(model: Any) -> None:
    """Replace methods of a model about to be trained by ones that do not walk over all modules.

    `train` acts only if the mode changes; parameters are listed and counted once. The set of
    parameters must not change from here on.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    every = list(model.parameters())
    walk, count = model.train, base.num_parameters
    walk(model.training)  # a base is loaded in one mode and its adapter made in the other

    def train(mode: bool = True) -> Any:
        return model if model.training is mode else walk(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in every:
            parameter.grad = None

    def parameters(recurse: bool = True) -> Iterator[Any]:
        return iter(every)

    model.train, model.zero_grad, model.parameters = train, zero_grad, parameters
    base.num_parameters = cache(count)
