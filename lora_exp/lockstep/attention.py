"""Attention and positions: computed for each job by itself, in the job's own shape.

Shapes as in `segment`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from lora_exp.lockstep.segment import Pass, aligned, split


class Positions(nn.Module):
    """Replaces a rotary embedding: computes each job's in its own shape, once a pass."""

    def __init__(self, base: nn.Module, body: Any) -> None:
        super().__init__()
        self.base = base
        self.body = body

    def forward(self, x_1NC: Tensor, position_ids: Tensor, *rest: Any, **more: Any) -> Any:
        """Return cosines and sines, [1, N, D] each."""
        p = self.body.current
        parts = []
        for s, x in zip(p.segments, split(x_1NC, p.sizes), strict=False):
            embedded = self.base(s.rows(x), s.positions, *rest, **more)
            parts.append([s.flat(t)[None] for t in embedded])
        if p.filling:
            parts.append([t.new_zeros(1, p.filling, *t.shape[2:]) for t in parts[0]])
        return tuple(torch.cat(some, 1) for some in zip(*parts, strict=True))


def attention(
    module: Any,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each job's rows, with the job's own shape, mask and cache.

    Returns:
        The output of the heads, [1, N, H, D], and None for the weights.
    """
    p: Pass = module.fused_body.current
    streams = (split(t, p.sizes, 2) for t in (query_1HND, key_1HND, value_1HND))
    out = []
    for s, *embedded in zip(p.segments, *streams, strict=False):
        b, length = s.input_ids_BS.shape
        q, k, v = (
            aligned(t).reshape(t.shape[1], b, length, t.shape[3]).transpose(0, 1) for t in embedded
        )
        if s.past is not None:
            k, v = s.past.update(k, v, module.layer_idx)
        attended_BSHD, _ = sdpa_attention_forward(module, q, k, v, s.mask, scaling=scaling)
        out.append(attended_BSHD.reshape(1, s.tokens, *attended_BSHD.shape[2:]))
    if p.filling:
        out.append(out[0].new_zeros(1, p.filling, *out[0].shape[2:]))
    return torch.cat(out, 1), None


AttentionInterface.register("lockstep", attention)
AttentionMaskInterface.register("lockstep", lambda *_, **__: None)  # each segment has its own mask
