"""Attention between the fused projections: each job's heads in its own shape, mask and cache.

Shapes as in `segment`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lora_exp.lockstep.replacement import Replacement
from lora_exp.lockstep.segment import Pass, PerSegment, Segment, split

EAGER = "eager_attention_forward"  # transformers' name of it in each model's module
NAME = "lockstep"  # of `attention` in transformers' list
POSITIONS = ("position_embeddings", "position_ids")
PASTS = ("past_key_values", "layer_past")  # of an attention module


def own_function(module: Any, implementation: str) -> Callable[..., Any] | None:
    """Return the function by which an attention module computes its heads; None: not known."""
    if implementation == "sdpa":
        return sdpa_attention_forward  # type: ignore[no-any-return]
    own = vars(sys.modules[type(module).__module__])
    return own.get(EAGER) if implementation == "eager" else None


def attention(
    module: Any,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Any,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each job's rows, with the job's own shape, mask and cache.

    Returns:
        The output of the heads, [1, N, H, D], and None for the weights.
    """
    body = module.fused_body
    p: Pass = body.current
    compute = own_function(module, body.implementation)
    assert compute is not None
    arguments = {"attention_mask": attention_mask, **more}
    streams = (split(t, p.sizes, 2) for t in (query_1HND, key_1HND, value_1HND))
    out = []
    for i, (s, *heads) in enumerate(zip(p.segments, *streams, strict=False)):
        q, k, v = (_own_heads(t, s) for t in heads)
        past = p.own(i, body.pasts)
        if past is not None:
            k, v = past.update(k, v, module.layer_idx)

        own = partial(compute, module, q, k, v, **p.own_arguments(i, arguments))
        attended_BSHD = body.in_stream(i, own)[0]
        out.append(s.flat(attended_BSHD)[None])
    if p.filling:
        out.append(out[0].new_zeros(1, p.filling, *out[0].shape[2:]))
    return torch.cat(out, 1), None


def _own_heads(t_1HND: Tensor, s: Segment) -> Tensor:
    """Return a job's heads, [B, H, S, D], laid out in memory as in a run alone."""
    tokens_first = t_1HND.stride(1) < t_1HND.stride(2)  # in memory
    t_BSHD = s.rows(t_1HND.transpose(1, 2))
    t_BHSD = t_BSHD.transpose(1, 2)
    return t_BHSD if tokens_first else t_BHSD.contiguous()


class FusedAttention(Replacement):
    """Replaces an attention module: its projections run once for all jobs, its heads do not."""

    def __init__(self, base: nn.Module, body: Any) -> None:
        """Replace a module whose parts are replaced by fused ones.

        Args:
            base: the module.
            body: the `FusedBody`; it is no nn.Module, so it does not become a submodule.
        """
        super().__init__(base, body)
        self.parameter_names = list(inspect.signature(base.forward).parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; positions lie side by side, `attention` fills the caches."""
        arguments = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        p: Pass = self.body.current
        with self.body.known():
            for name in POSITIONS:
                if isinstance(value := arguments.get(name), PerSegment):
                    arguments[name] = _positions(p, value)
        self.body.pasts = None
        for name in PASTS:
            if arguments.get(name) is not None:
                self.body.pasts, arguments[name] = arguments[name], None
        return self.base(**arguments)


def _positions(p: Pass, value: PerSegment) -> Any:
    def side_by_side(tensors: tuple[Any, ...]) -> Any:
        return p.side_by_side(tensors)

    if isinstance(value.values[0], tuple):
        return tuple(side_by_side(some) for some in zip(*value.values, strict=True))
    return side_by_side(value.values)


AttentionInterface.register(NAME, attention)
