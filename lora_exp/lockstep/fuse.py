"""One pass over the base for the rows of several jobs, each row computed as its job alone would.

Tokens of all jobs lie side by side, [1, N]: no padding between jobs. What works on single tokens
(norms, products, activations) runs once for all; attention runs for each job in the job's own shape
and with its own mask; each adapter sees its own job's tokens only.

Shapes: N tokens of all jobs; B rows, S tokens a row of one job; H heads, D head size; C channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask

from lora_exp.lockstep.state import Precision, RandomState


@dataclass(frozen=True)
class Mode:
    """How a pass computes; only requests of one mode can share one."""

    precision: Precision
    training: bool
    checkpointing: bool


@dataclass
class Segment:
    """One job's rows in a pass."""

    job: int
    input_ids_BS: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past: Any  # the job's own key-value cache while it generates
    random: RandomState  # the job's stream, from which its dropout draws
    mask: Any = field(default=None, init=False)  # as the job's attention takes it

    def __post_init__(self) -> None:
        self.tokens = self.input_ids_BS.numel()

    def asks(self, other: Segment) -> bool:
        """Say whether the other segment asks for the same."""
        mine, theirs = (
            (s.input_ids_BS, s.attention_mask, s.position_ids) for s in (self, other)
        )
        return other.past is None and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

    def rows(self, x_1NC: Tensor) -> Tensor:
        """Shape this segment's own tokens as its job's layers know them, [B, S, C]."""
        return x_1NC.view(*self.input_ids_BS.shape, -1)


def sharing_copy(model: Any) -> Any:
    """Copy the tree of modules, not the tensors: weights and quantisation states are the originals.

    8-bit layers move their weights' scales at their first use: here it is done before the copy.
    """
    kept: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        kept += [t for t in vars(state).values() if isinstance(t, Tensor)] if state else []
        weight = getattr(module, "weight", None)
        states = (getattr(owner, "quant_state", None) for owner in (module, weight))
        kept += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(x): x for x in kept})


class FusedBody:
    """A copy of the base's body that runs the rows of several jobs in one pass."""

    def __init__(self, body: Any, kind: str) -> None:
        self.own, self.own_config = sharing_copy(body), body.config
        self.body = sharing_copy(body)
        self.body.config._attn_implementation = "lockstep"
        self.kind = kind
        self.segments: list[Segment] = []
        self.rows: dict[Any, float] = {}  # for each shape of layer, see `rows_alike`
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
        for module in self.modules:  # 8-bit layers compute differently while they train
            module.training = mode.training
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = mode.checkpointing
        if mode not in self.proven:
            self.rows = {}
            with torch.no_grad(), keeping_random():
                for linear in self.linears.values():
                    if linear.shape not in self.rows and self.kind == "exact":
                        self.rows[linear.shape] = rows_alike(linear.base, self._dtype())
                self.proven[mode] = self.rows if self._is_exact() else None
        self.rows = self.proven[mode] or {}
        return self.proven[mode] is not None

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.body.get_input_embeddings().weight.dtype
        return dtype

    def _is_exact(self) -> bool:
        """Compare one pass over three jobs' random rows with the base's own forward."""
        device = self.body.device
        self.own.train(self.body.training)
        segments = []
        for job, (b, length, padding) in enumerate([(2, 9, 3), (1, 40, 0), (3, 21, 5)]):
            ids = torch.randint(self.own_config.vocab_size, (b, length), device=device)
            mask = torch.ones_like(ids)
            mask[0, length - padding :] = 0
            segments.append(Segment(-1 - job, ids, mask, None, None, RandomState.now()))
        for s, hidden in zip(segments, self.forward(segments), strict=True):
            own = self.own(
                input_ids=s.input_ids_BS, attention_mask=s.attention_mask, use_cache=False
            ).last_hidden_state
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
        parts = hidden_1NC.split([s.tokens for s in segments], 1)
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
        return nullcontext(), self._again(self.segments, [s.random for s in self.segments])

    @contextmanager
    def _again(self, segments: list[Segment], randoms: list[RandomState]) -> Iterator[None]:
        after = [s.random for s in segments]
        for s, random in zip(segments, randoms, strict=True):
            s.random = random
        try:
            with self._pass(segments):
                yield
        finally:
            for s, random in zip(segments, after, strict=True):
                s.random = random


@contextmanager
def keeping_random() -> Iterator[None]:
    """Draw random numbers that nobody notices."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()


def rows_alike(linear: Any, dtype: torch.dtype) -> float:
    """Measure from how many rows on a product is the same, bit for bit, alone and among others.

    Forward and backward, with outliers, which 8-bit products treat by the column of the whole.

    Returns:
        The least number of rows; infinity where the others always show.
    """
    found, device = math.inf, linear.weight.device
    for least in (64, 16, 1):
        sizes = [least, least + 1, 3 * least + 5, least, 150 + least, 2 * least + 1]
        x_1NC = torch.randn(1, sum(sizes), linear.in_features, device=device, dtype=dtype)
        x_1NC[:, :: 2 * least + 3, ::7] *= 20
        dy_1NC = torch.randn(1, sum(sizes), linear.out_features, device=device, dtype=dtype)
        y_1NC, dx_1NC = _product(linear, x_1NC, dy_1NC)
        parts = (t.split(sizes, 1) for t in (x_1NC, dy_1NC, y_1NC, dx_1NC))
        for x, dy, y, dx in zip(*parts, strict=True):
            alone = _product(linear, x, dy)
            if not (torch.equal(alone[0], y) and torch.equal(alone[1], dx)):
                return found
        found = least
    return found


def _product(linear: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y: Tensor = linear(x)
        y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def unfusable(model: Any) -> str | None:
    """Say why jobs on this base cannot share a pass; None where they can."""
    body, config = model.base_model, model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or not body._supports_attention_backend:
        return f"its attention is {config._attn_implementation}, not sdpa"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "its attention slides"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ({rope}) depends on the longest row"
    if getattr(config, "attention_dropout", 0) or any(
        isinstance(m, nn.Dropout) and m.p for m in body.modules()
    ):
        return "it has dropout of its own"
    for module in body.modules():
        known = isinstance(module, nn.Linear | nn.Embedding) or "Norm" in type(module).__name__
        if not known and list(module.parameters(recurse=False)):
            return f"{type(module).__name__} has weights that are no linear layer's"
    return None


class Adapter:
    """One job's LoRA layer, whose own forward gets the base's product instead of computing it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.given: Tensor | None = None
        base = layer.get_base_layer()
        compute = base.forward
        base.forward = lambda x: compute(x) if self.given is None else self.given

    def __call__(self, x_BSC: Tensor, product_BSC: Tensor, segment: Segment) -> Tensor:
        """Add the adapter's part to the base's product."""
        self.given = product_BSC
        try:
            with drawing(segment, self.layer.lora_dropout.values()):
                out: Tensor = self.layer(x_BSC)
        finally:
            self.given = None
        return out

    def active(self) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
        """Yield dropout, A, B and scaling of each adapter that is switched on."""
        layer = self.layer
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield layer.lora_dropout[name], a, b, layer.scaling[name]


@contextmanager
def drawing(segment: Segment, dropouts: Iterable[nn.Module]) -> Iterator[None]:
    """Draw from the job's random stream, where anything is drawn at all."""
    if not any(isinstance(d, nn.Dropout) and d.training for d in dropouts):
        yield
        return
    segment.random.restore()
    try:
        yield
    finally:
        segment.random = RandomState.now()


class FusedLinear(nn.Module):
    """A linear layer of the base with, for each job that adapts it, the job's own adapter.

    `exact`: the base's product of all tokens at once where that is known to be, bit for bit, the
    product of each segment alone (`FusedBody.rows`); then peft's own forward for each job. `bmm`: adapters are
    stacked too, ranks and tokens padded with zeros; about 1e-6 off.
    """

    def __init__(self, base: nn.Module, body: FusedBody) -> None:
        super().__init__()
        self.base = base
        self.layers: dict[int, Adapter] = {}  # the jobs' modules, not ours
        object.__setattr__(self, "body", body)
        weight: Any = base.weight
        self.shape = (type(base), base.in_features, base.out_features, weight.dtype)

    def forward(self, x_1NC: Tensor) -> Tensor:
        """Return the adapted products, [1, N, C]."""
        segments: list[Segment] = self.body.segments
        sizes, rows = [s.tokens for s in segments], self.body.rows.get(self.shape, math.inf)
        if self.body.kind == "bmm":
            return self._stacked(x_1NC, segments)
        products = self._products(x_1NC, segments, rows)
        if not self.layers:
            return products[0] if len(products) == 1 else torch.cat(products, 1)
        # split again, so that autograd adds up the gradients of x in the order of a run alone
        out = []
        for s, x, y in zip(segments, x_1NC.split(sizes, 1), products, strict=True):
            layer = self.layers.get(s.job)
            done = y if layer is None else layer(s.rows(x), s.rows(y), s)
            out.append(done.reshape(1, s.tokens, -1))
        return torch.cat(out, 1)

    def _products(self, x_1NC: Tensor, segments: list[Segment], rows: float) -> list[Tensor]:
        """Return the base's product of each segment: at once, where that is exact."""
        sizes = [s.tokens for s in segments]
        some = sum(size >= rows for size in sizes) > 1
        whole = self.base(x_1NC).split(sizes, 1) if some else [None] * len(sizes)
        if some and min(sizes) >= rows:
            return list(whole)
        alone = zip(segments, x_1NC.split(sizes, 1), whole, strict=True)
        return [
            y if some and s.tokens >= rows else self.base(s.rows(x)).view(1, s.tokens, -1)
            for s, x, y in alone
        ]

    def _stacked(self, x_1NC: Tensor, segments: list[Segment]) -> Tensor:
        """Add all adapters in two batched products; J jobs, T tokens of the longest, R top rank."""
        y_1NC: Tensor = self.base(x_1NC)
        parts = zip(segments, x_1NC[0].split([s.tokens for s in segments]), strict=True)
        found = [(s, x, a) for s, x in parts if (layer := self.layers.get(s.job)) for a in layer.active()]
        if not found:
            return y_1NC
        xs, downs, ups = [], [], []
        for s, x, (dropout, down, up, scaling) in found:
            with drawing(s, [dropout]):
                xs.append(dropout(x.to(down.dtype)))
            downs.append(down)
            ups.append(up.T * scaling)
        x_JTC, a_JRC, b_JRC = (pad_sequence(t, batch_first=True) for t in (xs, downs, ups))
        delta_JTC = torch.bmm(torch.bmm(x_JTC, a_JRC.mT), b_JRC)
        deltas: dict[int, Tensor] = {}
        for (s, _, _), delta in zip(found, delta_JTC, strict=True):
            deltas[s.job] = deltas.get(s.job, 0) + delta[: s.tokens]
        none = y_1NC.new_zeros
        rows = [deltas.get(s.job, none((s.tokens, y_1NC.shape[-1]))) for s in segments]
        return y_1NC + torch.cat(rows)[None].to(y_1NC.dtype)


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
    streams = (t.split(sizes, 2) for t in (query_1HND, key_1HND, value_1HND))
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
