"""What a body returns: its tensors, their cut from the graph, and the caches that it fills."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_exp.lockstep.segment import Segment


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a body's output: hidden states first; not those of a cache."""
    found: list[Tensor] = []
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_of(value)
    return found


def without_padding(s: Segment, x: Tensor) -> Tensor:
    """Return the rows of a segment's tensor that somebody uses: not those of padding."""
    if s.attention_mask is None or x.shape[:2] != s.input_ids_BS.shape:
        return x
    return x[s.attention_mask[:, -s.input_ids_BS.shape[1] :].bool()]


def cut(value: Any, ends: list[Tensor], leaves: list[Tensor]) -> Any:
    """Return an output with its tensors cut from their graph; collect both sides of the cut."""
    if isinstance(value, Tensor) and value.requires_grad:
        for end, leaf in zip(ends, leaves, strict=True):
            if end is value:
                return leaf
        ends.append(value)
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]
    if isinstance(value, dict):  # a ModelOutput
        for key, part in value.items():
            value[key] = cut(part, ends, leaves)
    elif isinstance(value, tuple | list):
        return type(value)(cut(part, ends, leaves) for part in value)
    return value


def snapshot(past: Any) -> Callable[[], None]:
    """Return what restores a cache: attention replaces its tensors, others write into theirs."""
    layers = past.layers if past is not None else []
    saved = [
        {k: copy.deepcopy(v) if isinstance(v, list | dict) else v for k, v in vars(layer).items()}
        for layer in layers
    ]

    def restore() -> None:
        del layers[len(saved) :]
        for layer, values in zip(layers, saved, strict=True):
            vars(layer).clear()
            vars(layer).update(values)

    return restore
