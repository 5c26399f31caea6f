"""One pass over the base for the rows of several jobs, each row computed as its job alone would.

Tokens of all jobs lie side by side, [1, N]: no padding between jobs. What works on single tokens
(norms, products, activations) runs once for all; attention runs for each job in the job's own shape
and with its own mask; each adapter sees its own job's tokens only. Shapes as in `segment`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask

from lora_exp.lockstep.exact import keeping_random, rows_alike
from lora_exp.lockstep.linear import Adapter, FusedLinear, split
from lora_exp.lockstep.segment import Mode, Segment
from lora_exp.lockstep.state import RandomState
from lora_exp.model.loading import sharing_copy

# rows, tokens and padding of the jobs in a pass that proves itself: answers are made token by token
SHAPES = [(2, 9, 3), (1, 40, 0), (3, 21, 5), (1, 1, 0), (16, 1, 0), (5, 2, 1)]


class FusedBody:
    """A copy of the base's body that runs the rows of several jobs in one pass."""

    def __init__(self, body: Any, kind: str) -> None:
        self.own, self.own_config = sharing_copy(body), body.config
        self.body = sharing_copy(body)
        self.body.config._attn_implementation = "lockstep"
        self.kind = kind
        self.segments: list[Segment] = []
        self.rows: dict[Any, float] = {}  # for each shape of layer, see `rows_alike`
        self.mode: Mode | None = None
        self.proven: dict[Mode, dict[Any, float] | None] = {}
        self.linears: dict[str, FusedLinear] = {}
        for name, module in list(self.body.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                self.linears[name] = FusedLinear(module, self)
                setattr(self.body.get_submodule(parent), leaf, self.linears[name])
        self.modules = [m for m in self.body.modules() if not isinstance(m, FusedLinear)]
        for module in self.body.modules():
            object.__setattr__(module, "fused_body", self)  # how `attention` finds the segments
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = partial(
                    checkpoint,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._recomputing,
                )

    def enter(self, mode: Mode) -> bool:
        """Compute as a mode says from here on, and say whether that is exact.

        Products differ in their last bits with the number of rows on some hardware and not on
        other; so nothing is assumed, and each mode is measured once.
        """
        mode.precision.restore()
        self._set(mode)
        if mode not in self.proven:
            self.rows = {}
            with torch.no_grad(), keeping_random():
                for linear in self.linears.values():
                    if linear.shape not in self.rows and self.kind == "exact":
                        self.rows[linear.shape] = rows_alike(
                            linear.base, self._dtype(), mode.precision.grad
                        )
                self.proven[mode] = self.rows if self._is_exact() else None
        self.rows = self.proven[mode] or {}
        return self.proven[mode] is not None

    def _set(self, mode: Mode) -> None:
        if mode == self.mode:
            return
        self.mode, self.rows = mode, self.proven.get(mode) or {}
        for module in self.modules:  # 8-bit layers compute differently while they train
            module.training = mode.training
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = mode.checkpointing

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.body.get_input_embeddings().weight.dtype
        return dtype

    def _is_exact(self) -> bool:
        """Compare one pass over three jobs' random rows with the base's own forward."""
        device = self.body.device
        self.own.train(self.body.training)
        segments = []
        for job, (b, length, padding) in enumerate(SHAPES):
            ids = torch.randint(self.own_config.vocab_size, (b, length), device=device)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0  # on the left, where the mask decides what others see
            segments.append(Segment(-1 - job, ids, mask, None, None, RandomState.now()))
        for s, hidden in zip(segments, self.forward(segments), strict=True):
            own = self.own(
                input_ids=s.input_ids_BS, attention_mask=s.attention_mask, use_cache=False
            ).last_hidden_state
            assert s.attention_mask is not None
            counted = s.attention_mask.bool()
            same = torch.equal(hidden[counted], own[counted])
            near = torch.allclose(hidden[counted], own[counted], rtol=1e-2, atol=1e-2)
            if not (same if self.kind == "exact" else near):
                return False
        return True

    def attach(self, job: int, body: Any) -> None:
        """Let a job's adapter, on its own copy of the body, take part."""
        for name, module in body.named_modules():
            if isinstance(module, LoraLayer):
                self.linears[name].layers[job] = Adapter(module)

    def detach(self, job: int) -> None:
        """Forget a job's adapter."""
        for linear in self.linears.values():
            linear.layers.pop(job, None)

    def is_bare(self, job: int) -> bool:
        """Say whether a job's adapter is switched off."""
        layers = (linear.layers.get(job) for linear in self.linears.values())
        return not any(next(layer.active(), None) for layer in layers if layer is not None)

    def forward(self, segments: list[Segment]) -> list[Tensor]:
        """Run the body over all segments.

        Returns:
            Each segment's last hidden states, [B, S, C].
        """
        device = segments[0].input_ids_BS.device
        positions = []
        for s in segments:
            b, length = s.input_ids_BS.shape
            seen = s.past.get_seq_length() if s.past is not None else 0
            ids = s.position_ids
            ids = torch.arange(length, device=device)[None] + seen if ids is None else ids
            like = self.body.get_input_embeddings().weight.new_empty((b, length, 1))
            s.mask = create_causal_mask(self.own_config, like, s.attention_mask, s.past, ids)
            positions.append(ids.expand(b, -1).reshape(-1))
        with self._pass(segments):
            hidden_1NC = self.body(
                input_ids=torch.cat([s.input_ids_BS.reshape(-1) for s in segments])[None],
                position_ids=torch.cat(positions)[None],
                use_cache=False,
            ).last_hidden_state
        parts = split(hidden_1NC, [s.tokens for s in segments])
        return [s.rows(part) for s, part in zip(segments, parts, strict=True)]

    @contextmanager
    def _pass(self, segments: list[Segment]) -> Iterator[None]:
        before, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = before

    def _recomputing(self) -> tuple[Any, Any]:
        """Return checkpoint's two contexts: a layer is recomputed in the pass that it ran in."""
        assert self.mode is not None
        return nullcontext(), self._again(
            self.mode, self.segments, [s.random for s in self.segments]
        )

    @contextmanager
    def _again(
        self, mode: Mode, segments: list[Segment], randoms: list[RandomState]
    ) -> Iterator[None]:
        self._set(mode)  # another may have been entered since
        after = [s.random for s in segments]
        for s, random in zip(segments, randoms, strict=True):
            s.random = random
        try:
            with self._pass(segments):
                yield
        finally:
            for s, random in zip(segments, after, strict=True):
                s.random = random


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
    """Attend within each job's rows, in the job's own shape, mask and cache.

    Returns:
        What the heads saw, [1, N, H, D], and no weights.
    """
    segments: list[Segment] = module.fused_body.segments
    sizes = [s.tokens for s in segments]
    streams = (split(t, sizes, 2) for t in (query_1HND, key_1HND, value_1HND))
    out = []
    for s, *own in zip(segments, *streams, strict=True):
        b, length = s.input_ids_BS.shape
        q, k, v = (t[0].unflatten(1, (b, length)).transpose(0, 1) for t in own)
        if s.past is not None:
            k, v = s.past.update(k, v, module.layer_idx)
        seen_BSHD, _ = sdpa_attention_forward(module, q, k, v, s.mask, scaling=scaling)
        out.append(seen_BSHD.reshape(1, s.tokens, *seen_BSHD.shape[2:]))
    return torch.cat(out, 1), None


AttentionInterface.register("lockstep", attention)
AttentionMaskInterface.register("lockstep", lambda *_, **__: None)  # each segment has its own
