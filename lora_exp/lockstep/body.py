"""One pass over the base for the rows of several jobs, with the bits of each job alone.

Tokens of all jobs lie side by side, [1, N]: no padding between jobs. Layers that compute each
token by itself (norms, products, activations) run once for all jobs; attention runs for each job in
its own shape and with its own mask; each adapter gets only its own job's tokens.

Shapes as in `segment`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2CLS
from transformers.masking_utils import create_causal_mask

from lora_exp.lockstep.attention import Positions
from lora_exp.lockstep.classes import LayerSignature, RowClasses
from lora_exp.lockstep.eligibility import preserved_random_state
from lora_exp.lockstep.grouping import Sizes, group, on_grid
from lora_exp.lockstep.linear import Adapter, FusedLinear
from lora_exp.lockstep.rowwise import Rowwise, Unmeasured
from lora_exp.lockstep.segment import LayerGroups, Pass, PassContext, Segment, split
from lora_exp.lockstep.state import RandomState
from lora_exp.model.loading import sharing_copy

log = logging.getLogger("lora_exp")
# rows, tokens and padding of the jobs in a test pass; one token a row, as in generation, is in it
SHAPES = [(2, 9, 3), (1, 40, 0), (3, 21, 5), (1, 1, 0), (16, 1, 0), (5, 2, 1)]
ACTIVATIONS = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
Groupings = tuple[LayerGroups | None, ...]  # by layer
MAX_GROUPINGS = 1000  # combinations of numbers of rows whose groups are cached
MAX_TOTALS = 64  # different lengths of passes; beyond these, lengths are rounded up to a grid


class FusedBody:
    """A copy of the base's body that runs the rows of several jobs in one pass."""

    def __init__(self, body: Any, mode: str) -> None:
        self.reference, self.reference_config = sharing_copy(body), body.config
        self.body = sharing_copy(body)
        self.body.config._attn_implementation = "lockstep"
        self.mode = mode
        self.current = Pass([], 0, None)
        self.context: PassContext | None = None
        self.proven: dict[PassContext, bool] = {}
        self.classes = RowClasses(str(body.device))
        # by context and numbers of rows: the filling, and the groups of each layer
        self.groupings: dict[tuple[PassContext, Sizes], tuple[int, Groupings]] = {}
        self.totals: set[int] = set()
        self.layers: list[Rowwise] = []
        self.linears: dict[str, FusedLinear] = {}
        for name, module in list(self.body.named_modules()):
            if (replacement := self._replacement(name, module)) is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(self.body.get_submodule(parent), leaf, replacement)
        replacements = Rowwise | Positions
        self.modules = [m for m in self.body.modules() if not isinstance(m, replacements)]
        for module in self.body.modules():
            object.__setattr__(module, "fused_body", self)  # `attention` reads the segments from it
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = partial(
                    checkpoint,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._recompute_contexts,
                )

    def _replacement(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what replaces a module; None if it stays."""
        index = len(self.layers)
        if isinstance(module, nn.Linear):
            self.linears[name] = FusedLinear(module, self, index)
            self.layers.append(self.linears[name])
            return self.linears[name]
        if "RotaryEmbedding" in type(module).__name__:
            return Positions(module, self)
        norm = "Norm" in type(module).__name__
        if norm or isinstance(module, ACTIVATIONS):
            self.layers.append(Rowwise(module, self, index, divisible=not norm))
            return self.layers[-1]
        return None

    def enter(self, context: PassContext) -> bool:
        """Set the context of the passes that follow, and return whether they are exact in it.

        This is tested once for each context: passes over random rows, of each job alone and of all
        jobs, must equal the base's own forward.
        """
        context.compute_state.restore()
        self._set_context(context)
        if context not in self.proven:
            with preserved_random_state():
                torch.manual_seed(0)  # the same rows in every process
                try:
                    self.proven[context] = self._is_exact()
                except Unmeasured as error:
                    log.info("lockstep: jobs share no pass: %s", error)
                    self.proven[context] = False
        return self.proven[context]

    def _set_context(self, context: PassContext) -> None:
        if context == self.context:
            return
        self.context = context
        for module in self.modules:  # 8-bit layers compute differently while they train
            module.training = context.training
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = context.checkpointing

    def _is_exact(self) -> bool:
        """Compare passes over some jobs' random rows with the base's own forward."""
        device = self.body.device
        self.reference.train(self.body.training)
        segments, expected = [], {}
        for job, (b, length, padding) in enumerate(SHAPES):
            ids = torch.randint(self.reference_config.vocab_size, (b, length), device=device)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0  # on the left, where a mask is needed
            segments.append(Segment(-1 - job, ids, mask, None, None, RandomState.now()))
            out = self.reference(input_ids=ids, attention_mask=mask, use_cache=False)
            expected[-1 - job] = out.last_hidden_state
        for s in segments:  # these passes also show each layer the shape of its rows
            if not self._equals(Pass([s], 0, None), expected):
                return False
        return all(self._equals(p, expected) for p in self.passes(segments))

    def _equals(self, p: Pass, expected: dict[int, Tensor]) -> bool:
        for s, hidden in zip(p.segments, self.forward(p), strict=True):
            assert s.attention_mask is not None
            real = s.attention_mask.bool()
            equal = torch.equal(hidden[real], expected[s.job][real])
            close = torch.allclose(hidden[real], expected[s.job][real], rtol=1e-2, atol=1e-2)
            if not (equal if self.mode == "exact" else close):
                return False
        return True

    def passes(self, segments: list[Segment]) -> list[Pass]:
        """Return the passes for segments of the current context: one pass, if the norms allow it.

        New numbers of rows are measured here.
        """
        context, sizes = self.context, tuple(s.tokens for s in segments)
        assert context is not None
        if self.mode == "bmm" or len(sizes) == 1:
            return [Pass(segments, 0, None)]
        if (context, sizes) not in self.groupings:
            total = sum(sizes)
            if total not in self.totals and len(self.totals) >= MAX_TOTALS:
                total = on_grid(total)
            self.totals.add(total)
            with preserved_random_state():
                groupings = self._groupings(context, sizes, total)
            if len(self.groupings) >= MAX_GROUPINGS:
                self.groupings.clear()
            self.groupings[context, sizes] = total - sum(sizes), groupings
        filling, groupings = self.groupings[context, sizes]
        rows = sum(sizes) + filling
        for layer, layer_groups in zip(self.layers, groupings, strict=True):
            if layer_groups is None or layer_groups.groups[0].is_whole_pass(sizes, rows):
                continue
            if not layer.divisible or layer.signatures[context].heads_first:
                return [Pass([s], 0, None) for s in segments]
        return [Pass(segments, filling, groupings)]

    def _groupings(self, context: PassContext, sizes: Sizes, total: int) -> Groupings:
        groupings: dict[LayerSignature | None, LayerGroups | None] = {None: None}
        signatures = [layer.signatures.get(context) for layer in self.layers]
        for layer, signature in zip(self.layers, signatures, strict=True):
            if signature is not None and signature not in groupings:
                class_of = partial(self.classes.class_of, signature, layer.base)
                groupings[signature] = LayerGroups(signature.dtype, group(sizes, total, class_of))
        return tuple(groupings[signature] for signature in signatures)

    def count_products(self, p: Pass) -> tuple[int, int]:
        """Return how many of the jobs' products a pass shares, and how many there are."""
        if len(p.segments) == 1:
            return 0, 0
        by_layer = p.layer_groups or (None,) * len(self.layers)
        groups = [by_layer[linear.index] for linear in self.linears.values()]
        shared = [g for of_layer in groups if of_layer for g in of_layer.groups]
        count = sum(len(g.members) for g in shared if len(g.members) > 1)
        return count, len(groups) * len(p.segments)

    def attach(self, job: int, body: Any) -> None:
        """Add a job's adapter, which is on the job's own copy of the body."""
        for name, module in body.named_modules():
            if isinstance(module, LoraLayer):
                self.linears[name].adapters[job] = Adapter(module)

    def detach(self, job: int) -> None:
        """Remove a job's adapter."""
        for linear in self.linears.values():
            linear.adapters.pop(job, None)

    def adapter_is_off(self, job: int) -> bool:
        """Return whether a job's adapter is switched off."""
        adapters = (linear.adapters.get(job) for linear in self.linears.values())
        return not any(next(adapter.active(), None) for adapter in adapters if adapter is not None)

    def forward(self, p: Pass) -> list[Tensor]:
        """Run the body over all segments of a pass, in the current context.

        Returns:
            Each segment's last hidden states, [B, S, C].
        """
        segments = p.segments
        device = segments[0].input_ids_BS.device
        for s in segments:
            b, length = s.input_ids_BS.shape
            cached = s.past.get_seq_length() if s.past is not None else 0
            s.positions = s.position_ids
            if s.positions is None:
                s.positions = torch.arange(length, device=device)[None] + cached
            embeddings = self.body.get_input_embeddings().weight.new_empty((b, length, 1))
            s.mask = create_causal_mask(
                self.reference_config, embeddings, s.attention_mask, s.past, s.positions
            )
        filler = [torch.zeros(p.filling, dtype=torch.long, device=device)] if p.filling else []
        ids_N = torch.cat([*(s.input_ids_BS.reshape(-1) for s in segments), *filler])
        positions_N = torch.cat([*(s.flat(s.positions) for s in segments), *filler])
        with self._running(p):
            hidden_1NC = self.body(
                input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False
            ).last_hidden_state
        return [s.rows(part) for s, part in zip(segments, split(hidden_1NC, p.sizes), strict=False)]

    @contextmanager
    def _running(self, p: Pass) -> Iterator[None]:
        previous, self.current = self.current, p
        try:
            yield
        finally:
            self.current = previous

    def _recompute_contexts(self) -> tuple[Any, Any]:
        """Return checkpoint's two contexts: a layer is recomputed in the pass in which it ran."""
        assert self.context is not None
        return nullcontext(), self._recompute(
            self.context, self.current, [s.random for s in self.current.segments]
        )

    @contextmanager
    def _recompute(
        self, context: PassContext, p: Pass, random_states: list[RandomState]
    ) -> Iterator[None]:
        self._set_context(context)  # another one may have been set since
        current_states = [s.random for s in p.segments]
        for s, random in zip(p.segments, random_states, strict=True):
            s.random = random
        try:
            with self._running(p):
                yield
        finally:
            for s, random in zip(p.segments, current_states, strict=True):
                s.random = random
