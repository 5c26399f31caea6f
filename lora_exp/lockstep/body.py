"""One pass over the base for the rows of several jobs, each row computed as its job alone would.

Tokens of all jobs lie side by side, [1, N]: no padding between jobs. What works on single tokens
(norms, products, activations) runs once for all; attention runs for each job in the job's own shape
and with its own mask; each adapter sees its own job's tokens only. Shapes as in `segment`.
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
from lora_exp.lockstep.classes import Classes, Kind
from lora_exp.lockstep.eligibility import keeping_random
from lora_exp.lockstep.grouping import group, on_grid
from lora_exp.lockstep.linear import Adapter, FusedLinear
from lora_exp.lockstep.rowwise import Rowwise, Unmeasured
from lora_exp.lockstep.segment import Mode, Pass, Segment, Sharing, split
from lora_exp.lockstep.state import RandomState
from lora_exp.model.loading import sharing_copy

log = logging.getLogger("lora_exp")
# rows, tokens and padding of the jobs in a pass that proves itself: answers are made token by token
SHAPES = [(2, 9, 3), (1, 40, 0), (3, 21, 5), (1, 1, 0), (16, 1, 0), (5, 2, 1)]
ACTIVATIONS = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
REMEMBERED = 1000  # combinations of numbers of rows whose sharing is kept
TOTALS = 64  # different numbers of rows that passes may have before they are filled up to a grid


class FusedBody:
    """A copy of the base's body that runs the rows of several jobs in one pass."""

    def __init__(self, body: Any, kind: str) -> None:
        self.own, self.own_config = sharing_copy(body), body.config
        self.body = sharing_copy(body)
        self.body.config._attn_implementation = "lockstep"
        self.kind = kind
        self.current = Pass([], 0, None)
        self.mode: Mode | None = None
        self.proven: dict[Mode, bool] = {}
        self.classes = Classes(str(body.device))
        self.shared: dict[tuple[Mode, tuple[int, ...]], tuple[int, tuple[Sharing | None, ...]]] = {}
        self.totals: set[int] = set()
        self.layers: list[Rowwise] = []
        self.linears: dict[str, FusedLinear] = {}
        for name, module in list(self.body.named_modules()):
            if (stand_in := self._stand_in(name, module)) is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(self.body.get_submodule(parent), leaf, stand_in)
        ours = Rowwise | Positions
        self.modules = [m for m in self.body.modules() if not isinstance(m, ours)]
        for module in self.body.modules():
            object.__setattr__(module, "fused_body", self)  # how `attention` finds the segments
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = partial(
                    checkpoint,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._recomputing,
                )

    def _stand_in(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return what takes the place of a module, None where it stays."""
        place = len(self.layers)
        if isinstance(module, nn.Linear):
            self.linears[name] = FusedLinear(module, self, place)
            self.layers.append(self.linears[name])
            return self.linears[name]
        if "RotaryEmbedding" in type(module).__name__:
            return Positions(module, self)
        norm = "Norm" in type(module).__name__
        if norm or isinstance(module, ACTIVATIONS):
            self.layers.append(Rowwise(module, self, place, divisible=not norm))
            return self.layers[-1]
        return None

    def enter(self, mode: Mode) -> bool:
        """Compute as a mode says from here on, and say whether that is exact.

        Nothing is assumed of the base: passes over random rows, of each job alone and of all, must
        equal its own forward.
        """
        mode.precision.restore()
        self._set(mode)
        if mode not in self.proven:
            with keeping_random():
                torch.manual_seed(0)  # the same proof in every process
                try:
                    self.proven[mode] = self._is_exact()
                except Unmeasured as error:
                    log.info("lockstep: jobs share no pass: %s", error)
                    self.proven[mode] = False
        return self.proven[mode]

    def _set(self, mode: Mode) -> None:
        if mode == self.mode:
            return
        self.mode = mode
        for module in self.modules:  # 8-bit layers compute differently while they train
            module.training = mode.training
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = mode.checkpointing

    def _is_exact(self) -> bool:
        """Compare passes over some jobs' random rows with the base's own forward."""
        device = self.body.device
        self.own.train(self.body.training)
        segments, own = [], {}
        for job, (b, length, padding) in enumerate(SHAPES):
            ids = torch.randint(self.own_config.vocab_size, (b, length), device=device)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0  # on the left, where the mask decides what others see
            segments.append(Segment(-1 - job, ids, mask, None, None, RandomState.now()))
            out = self.own(input_ids=ids, attention_mask=mask, use_cache=False)
            own[-1 - job] = out.last_hidden_state
        for s in segments:  # which also shows each layer its rows
            if not self._equals(Pass([s], 0, None), own):
                return False
        return all(self._equals(p, own) for p in self.passes(segments))

    def _equals(self, p: Pass, own: dict[int, Tensor]) -> bool:
        for s, hidden in zip(p.segments, self.forward(p), strict=True):
            assert s.attention_mask is not None
            counted = s.attention_mask.bool()
            same = torch.equal(hidden[counted], own[s.job][counted])
            near = torch.allclose(hidden[counted], own[s.job][counted], rtol=1e-2, atol=1e-2)
            if not (same if self.kind == "exact" else near):
                return False
        return True

    def passes(self, segments: list[Segment]) -> list[Pass]:
        """Return the passes that segments of the current mode make: one, where norms allow it.

        Numbers of rows that are met for the first time are measured here.
        """
        mode, sizes = self.mode, tuple(s.tokens for s in segments)
        assert mode is not None
        if self.kind == "bmm" or len(sizes) == 1:
            return [Pass(segments, 0, None)]
        if (mode, sizes) not in self.shared:
            total = sum(sizes)
            if total not in self.totals and len(self.totals) >= TOTALS:
                total = on_grid(total)
            self.totals.add(total)
            with keeping_random():
                sharing = self._shared(mode, sizes, total)
            if len(self.shared) >= REMEMBERED:
                self.shared.clear()
            self.shared[mode, sizes] = total - sum(sizes), sharing
        filling, sharing = self.shared[mode, sizes]
        rows = sum(sizes) + filling
        for layer, own in zip(self.layers, sharing, strict=True):
            divisible = layer.divisible and not layer.kinds[mode].heads_first if own else True
            if own and not divisible and not own.groups[0].of_all(sizes, rows):
                return [Pass([s], 0, None) for s in segments]
        return [Pass(segments, filling, sharing)]

    def _shared(self, mode: Mode, sizes: tuple[int, ...], total: int) -> tuple[Sharing | None, ...]:
        of: dict[Kind | None, Sharing | None] = {None: None}
        kinds = [layer.kinds.get(mode) for layer in self.layers]
        for layer, kind in zip(self.layers, kinds, strict=True):
            if kind is not None and kind not in of:
                class_of = partial(self.classes.of, kind, layer.base)
                of[kind] = Sharing(kind.dtype, group(sizes, total, class_of))
        return tuple(of[kind] for kind in kinds)

    def products(self, p: Pass) -> tuple[int, int]:
        """Return how many of the jobs' products a pass makes together, and of how many it could."""
        if len(p.segments) == 1:
            return 0, 0
        of = [p.sharing[linear.place] if p.sharing else None for linear in self.linears.values()]
        groups = [g for sharing in of if sharing for g in sharing.groups if len(g.members) > 1]
        return sum(len(g.members) for g in groups), len(of) * len(p.segments)

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

    def forward(self, p: Pass) -> list[Tensor]:
        """Run the body over all segments of a pass, whose mode is entered.

        Returns:
            Each segment's last hidden states, [B, S, C].
        """
        segments = p.segments
        device = segments[0].input_ids_BS.device
        for s in segments:
            b, length = s.input_ids_BS.shape
            seen = s.past.get_seq_length() if s.past is not None else 0
            ids = s.position_ids
            s.positions = torch.arange(length, device=device)[None] + seen if ids is None else ids
            like = self.body.get_input_embeddings().weight.new_empty((b, length, 1))
            s.mask = create_causal_mask(
                self.own_config, like, s.attention_mask, s.past, s.positions
            )
        rest = [torch.zeros(p.filling, dtype=torch.long, device=device)] if p.filling else []
        ids_N = torch.cat([*(s.input_ids_BS.reshape(-1) for s in segments), *rest])
        places_N = torch.cat([*(s.flat(s.positions) for s in segments), *rest])
        with self._pass(p):
            hidden_1NC = self.body(
                input_ids=ids_N[None], position_ids=places_N[None], use_cache=False
            ).last_hidden_state
        return [s.rows(part) for s, part in zip(segments, split(hidden_1NC, p.sizes), strict=False)]

    @contextmanager
    def _pass(self, p: Pass) -> Iterator[None]:
        before, self.current = self.current, p
        try:
            yield
        finally:
            self.current = before

    def _recomputing(self) -> tuple[Any, Any]:
        """Return checkpoint's two contexts: a layer is recomputed in the pass that it ran in."""
        assert self.mode is not None
        return nullcontext(), self._again(
            self.mode, self.current, [s.random for s in self.current.segments]
        )

    @contextmanager
    def _again(self, mode: Mode, p: Pass, randoms: list[RandomState]) -> Iterator[None]:
        self._set(mode)  # another may have been entered since
        after = [s.random for s in p.segments]
        for s, random in zip(p.segments, randoms, strict=True):
            s.random = random
        try:
            with self._pass(p):
                yield
        finally:
            for s, random in zip(p.segments, after, strict=True):
                s.random = random
