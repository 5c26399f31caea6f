"""A body's own forward, stopped at each of its layers, so that several run a layer together.

The forward of each segment runs in a greenlet of its own: whatever a kind of model does before,
between and after its layers (embeddings, masks, positions, norms, the class of its output), its
own code does it, in the job's own shape. So do modules that a job computes by itself; they stop at
their linear layers, whose products are shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_exp.lockstep.attention import PASTS
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import CACHES, Absent, Pass, PerSegment

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LayerCall:
    """A layer that a body's forward has arrived at."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ProductCall:
    """A linear layer of the base that a module has arrived at."""

    name: str
    rows: Tensor


class Run(greenlet):  # type: ignore[misc]
    """A body's forward, or a module's, for one segment; gives its calls, and at last its output."""


def layers_of(body: nn.Module) -> dict[str, nn.Module]:
    """Return a body's outermost layers by name: modules of transformers' class for them."""
    layers: dict[str, nn.Module] = {}
    for name, module in body.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            layers[name] = module
    return layers


def stop_at_layers(body: nn.Module, linears: Collection[str]) -> None:
    """Let a body's layers and linear layers, within a `Run`, be computed by whoever runs it.

    Args:
        body: a job's, with its adapter or without.
        linears: names of linear layers of the base.
    """
    modules: dict[str, Any] = dict(body.named_modules())
    for name, layer in layers_of(body).items():
        modules[name].forward = _stopping(name, layer.forward)
    for name in modules.keys() & set(linears):
        base = modules[name]
        if isinstance(base, ParamWrapper):  # it computes with a weight of its own
            continue
        base = base.get_base_layer() if isinstance(base, LoraLayer) else base
        base.forward = _stopping_at_product(name, base.forward)


def _stopping(name: str, own_forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(own_forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = getcurrent()
        if not isinstance(run, Run):
            return own_forward(*args, **kwargs)
        call = LayerCall(name, dict(zip(names, args, strict=False)) | kwargs)
        answer = run.parent.switch(call)
        while callable(answer):  # a part of the layer that this job computes by itself
            answer = run.parent.switch(answer())
        return answer

    forward.alone = own_forward  # type: ignore[attr-defined]
    return forward


def _stopping_at_product(name: str, own_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(rows: Tensor, *more: Any) -> Any:
        run = getcurrent()
        product = run.parent.switch(ProductCall(name, rows)) if isinstance(run, Run) else None
        return own_forward(rows, *more) if product is None else product

    return forward


def alone(layer: Any, **arguments: Any) -> Any:
    """Run a layer's own forward; whoever calls it recomputes it, so it keeps its tensors."""
    modules = [m for m in layer.modules() if getattr(m, "gradient_checkpointing", False)]
    if modules and layer.training:  # a layer that is recomputed must not fill its cache again
        arguments |= dict.fromkeys(arguments.keys() & {*CACHES, *PASTS})
    for module in modules:  # layers may have layers inside
        module.gradient_checkpointing = False
    try:
        return layer.forward.alone(**arguments)
    finally:
        for module in modules:
            module.gradient_checkpointing = True


class Carried:
    """The hidden states between two layers: those of all jobs, and each job's part of them."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None
        self.parts: list[tuple[Tensor, int]] = []  # with its version: a job may write into it

    def merged(self, p: Pass, calls: list[LayerCall]) -> dict[str, Any]:
        """Return the arguments of one layer for all segments."""
        arguments: dict[str, Any] = {}
        for name in dict.fromkeys(name for call in calls for name in call.arguments):
            values = [call.arguments.get(name, Absent) for call in calls]
            if self.whole is not None and all(map(self._is_unchanged, values, self.parts)):
                arguments[name] = self.whole
            elif "mask" in name and any(isinstance(v, Tensor) for v in values):
                arguments[name] = PerSegment(tuple(values))
            else:
                arguments[name] = p.joined(values)
        return arguments

    @staticmethod
    def _is_unchanged(value: Any, part: tuple[Tensor, int]) -> bool:
        return value is part[0] and part[0]._version == part[1]

    def divided(self, p: Pass, output: Any) -> list[Any]:
        """Return each segment's part of a layer's output.

        Raises:
            Unmeasured: an output is no row of hidden states.
        """
        if isinstance(output, tuple):
            first, *others = output
            rest = [[p.own(i, value) for i in range(len(p.segments))] for value in others]
            return list(zip(self.divided(p, first), *rest, strict=True))
        if p.dim_of_rows(output) is None:
            raise Unmeasured(f"a layer returns {getattr(output, 'shape', type(output).__name__)}")
        parts = [p.own(i, output) for i in range(len(p.segments))]
        self.whole, self.parts = output, [(part, part._version) for part in parts]
        return parts
