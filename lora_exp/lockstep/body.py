"""One pass over the base for the rows of several jobs, with the bits of each job alone.

Each job's body runs its own forward, and stops at each layer (see `layers`). There the tokens of
all jobs lie side by side, [1, N]: no padding between jobs. Norms, products and activations of the
layer run once for all jobs; each adapter gets only its own job's tokens; what mixes tokens, and
what is not known, runs for each job by itself (see `segmentwise`).

Shapes as in `segment`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_exp.lockstep import attention, proof
from lora_exp.lockstep.classes import RowClasses
from lora_exp.lockstep.eligibility import described, preserved_random_state
from lora_exp.lockstep.fusing import FusedLayers
from lora_exp.lockstep.hub import out_of_memory
from lora_exp.lockstep.layers import Carried, LayerCall, Run, alone, stop_at_layers
from lora_exp.lockstep.layout import Layout
from lora_exp.lockstep.linear import Adapter
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import Pass, PassContext, Segment
from lora_exp.lockstep.segmentwise import outputs_of
from lora_exp.lockstep.state import RandomState
from lora_exp.model.sharing import sharing_copy

log = logging.getLogger("lora_exp")


class FusedBody:
    """A copy of the base's body whose layers run the rows of several jobs at once."""

    def __init__(self, body: Any, mode: str) -> None:
        self.reference = sharing_copy(body)
        self.implementation = body.config._attn_implementation
        self.body = sharing_copy(body)
        self.body.config._attn_implementation = attention.NAME
        self.mode = mode
        self.current = Pass([], 0, None)
        self.runs: tuple[Run, ...] = ()  # of its segments
        self.pasts: Any = None  # the jobs' caches, while an attention module runs for all of them
        self.depth = 0  # of modules that are known to keep jobs apart, see `proof`
        self.context: PassContext | None = None
        self.proven: dict[PassContext, bool] = {}
        self.why_apart: dict[PassContext, str] = {}  # of contexts that are not proven
        # whether only products are shared, and each job runs its own layers, by proven context
        self.own_layers: dict[PassContext, bool] = {}
        self.classes = RowClasses(str(body.device))
        layers = FusedLayers(self.body, self)
        self.blocks, self.layers, self.linears = layers.blocks, layers.rowwise, layers.linears
        self.modules = layers.modules
        # whether a layer mixes tokens by attention alone, which sees no padding
        self.attends_only = not layers.segmentwise
        self.keeps_padding: set[PassContext] = set()  # where no proof has left it out
        self.reads_padding: set[int] = set()  # jobs whose trainers may read hidden states of it
        self.layout = Layout(self)
        for module in self.modules:
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = self._checkpoint
        stop_at_layers(self.reference, self.linears)
        self.jobs: dict[int, tuple[Any, Callable[..., Any]]] = {}  # bodies, and their own forward

    def enter(self, context: PassContext) -> bool:
        """Set the context of the passes that follow, and return whether they are exact in it.

        This is tested once for each context: passes over random rows, of each job alone and of all
        jobs, must equal the base's own forward. If the layers are not exact when they run once for
        all jobs, each job runs its own, and only their products are shared. A test that fails in
        any way proves nothing.
        """
        context.compute_state.restore()
        self._set_context(context)
        if context not in self.proven:
            with preserved_random_state():
                self.proven[context] = self._prove(context)
        return self.proven[context]

    def _prove(self, context: PassContext) -> bool:
        self.reference.train(context.training)
        for own_layers in (False, True):
            self.own_layers[context] = own_layers
            torch.manual_seed(0)  # the same rows in every process
            try:
                different = proof.difference(self)
            except Exception as error:
                if out_of_memory(error):
                    raise
                different = described(error)
            finally:
                torch.clear_autocast_cache()
            if different is None:
                return True
            log.debug("lockstep: %s layers: %s", "own" if own_layers else "fused", different)
            for layer in self.layers:
                layer.signatures.pop(context, None)
            self.layout.groupings.clear()
        self.distrust(context, str(different))
        return False

    def distrust(self, context: PassContext, reason: str) -> None:
        """Share no further pass in a context."""
        self.proven[context], self.why_apart[context] = False, reason
        log.info("lockstep: jobs share no pass: %s", reason)

    def _set_context(self, context: PassContext) -> None:
        if context == self.context:
            return
        self.context = context
        for module in self.modules:  # 8-bit layers compute differently while they train
            module.training = context.training
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = context.checkpointing

    def passes(self, segments: list[Segment]) -> list[Pass]:
        """Return the passes for segments of the current context; see `Layout.passes`."""
        return self.layout.passes(segments)

    def leaves_out_padding(self, context: PassContext) -> bool:
        """Return whether passes in a context, which is proven, may leave out padding."""
        if self.mode != "exact" or not self.proven.get(context, False):
            return False
        is_shared = self.attends_only and not self.own_layers[context]
        return is_shared and context not in self.keeps_padding

    def tokens_of(self, job: int, arguments: dict[str, Any], context: PassContext) -> int:
        """Return how many tokens of a call of a job's body would be in a pass."""
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        keeps = not self.leaves_out_padding(context) or job in self.reads_padding
        if keeps or mask is None or mask.shape != ids.shape:
            return int(ids.numel())
        return int((mask != 0).sum())

    def count_products(self, p: Pass) -> tuple[int, int]:
        """Return how many of the jobs' products a pass shares, and how many there are."""
        if p.layer_groups is None:  # a single job's, or in bmm, where all share all
            count = len(self.linears) * len(p.segments) * (len(p.segments) > 1)
            return count, count
        used = [linear for linear in self.linears.values() if self.context in linear.signatures]
        by_layer = [p.layer_groups[linear.index] for linear in used]
        shared = [g for groups in by_layer if groups for g in groups.groups]
        count = sum(len(g.members) for g in shared if len(g.members) > 1)
        return count, len(used) * len(p.segments)

    def attach(self, job: int, body: Any, own_forward: Callable[..., Any]) -> None:
        """Add a job: its own copy of the body, with its adapter, and the body's own forward."""
        stop_at_layers(body, self.linears)
        self.jobs[job] = body, own_forward
        for name, module in body.named_modules():
            if isinstance(module, LoraLayer) and name in self.linears:
                self.linears[name].adapters[job] = Adapter(module)

    def detach(self, job: int) -> None:
        """Remove a job."""
        self.jobs.pop(job, None)
        self.reads_padding.discard(job)
        for linear in self.linears.values():
            linear.adapters.pop(job, None)

    def own_module(self, job: int, name: str) -> nn.Module:
        """Return a module of a job's own body; of the reference while passes are tested."""
        body = self.jobs[job][0] if job >= 0 else self.reference
        module: nn.Module = body.get_submodule(name)
        return module

    def adapter_is_off(self, job: int) -> bool:
        """Return whether a job's adapter is switched off."""
        layers = (m for m in self.jobs[job][0].modules() if isinstance(m, LoraLayer))
        return not any(next(Adapter.active_of(layer), None) for layer in layers)

    def forward(self, p: Pass) -> list[Any]:
        """Run the body over all segments of a pass, in the current context.

        Returns:
            The output that the body's own forward has for each segment.
        """
        runs = []
        for s in p.segments:
            forward = self.jobs[s.job][1] if s.job >= 0 else self.reference
            runs.append(Run(partial(forward, **s.arguments)))
        carried = Carried()
        with self._running(p, tuple(runs)):
            try:
                answers: list[Any] = [self.resume(run, i) for i, run in enumerate(runs)]
                while any(isinstance(answer, LayerCall) for answer in answers):
                    outputs = self._layer(p, answers, carried)
                    answers = [self.resume(run, i, outputs[i]) for i, run in enumerate(runs)]
            finally:
                for run in runs:
                    if run:  # it has begun and not ended: something failed
                        run.throw()
        return answers

    def _layer(self, p: Pass, calls: list[Any], carried: Carried) -> Any:
        """Return each segment's output of a layer at which all have arrived."""
        if len({getattr(call, "name", None) for call in calls}) > 1:
            raise Unmeasured("the jobs compute different layers")
        assert self.context is not None
        if not self.own_layers[self.context]:
            return carried.divided(p, self.blocks[calls[0].name](**carried.merged(p, calls)))
        layers = [self.own_module(s.job, calls[0].name) for s in p.segments]
        own = [partial(alone, m, **c.arguments) for m, c in zip(layers, calls, strict=True)]
        compute = partial(outputs_of, self, own)
        with self.known():
            return self._checkpoint(compute) if self.context.checkpointing else compute()

    def resume(self, run: Run, index: int, *answer: Any) -> Any:
        """Let a segment's own forward go on, with its job's random stream, to its next call."""
        return self.in_stream(index, partial(run.switch, *answer))

    def in_stream(self, index: int, function: Callable[[], Any]) -> Any:
        """Call a function that draws, if it does, from a segment's job's random stream."""
        assert self.context is not None
        with self.known():
            if not self.context.training:
                return function()
            s = self.current.segments[index]
            s.random.restore()
            try:
                return function()
            finally:
                s.random = RandomState.now()

    @contextmanager
    def known(self) -> Iterator[None]:
        """Mark operations within as known to keep the jobs' rows apart."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def _running(self, p: Pass, runs: tuple[Run, ...] = ()) -> Iterator[None]:
        previous = self.current, self.runs
        self.current, self.runs = p, runs
        try:
            yield
        finally:
            self.current, self.runs = previous
            self.pasts = None

    def _checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._recompute_contexts,
        )

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
