"""A pack: jobs on one base, their trainers unmodified, their forwards and backwards made as one.

A trainer meets the others at two points: where its model's body runs, and where `backward` is
called. The graph is cut between them: a job's own loss goes back to its hidden states by itself,
and from there the pack goes back through the base for all jobs at once. So a pass that fails can be
made again.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.eligibility import foreign, unfusable
from lora_exp.lockstep.hub import Hub, Request
from lora_exp.lockstep.segment import Mode, Segment
from lora_exp.lockstep.state import Precision
from lora_exp.lockstep.verification import Member, Verification
from lora_exp.model.loading import Base, base_of, device, sharing_copy
from lora_exp.model.memory import free_bytes, reset_peak
from lora_exp.model.requirement import training_bytes

# tokens in one pass: more of them leave a CPU's caches, and keep a GPU no busier
ROOM = {"cpu": 2048, "cuda": 16384}
log = logging.getLogger("lora_exp")


@dataclass(eq=False)
class Tape:
    """What leads back from a job's hidden states to its adapter."""

    made: list[Tape]  # the tapes of the same pass, whose graph they share
    segment: Segment  # as it was before the pass drew random numbers
    mode: Mode
    hidden: Tensor | None  # None: the pass has to be made again
    leaf: Tensor  # the same values for the job, which leaves its gradient there
    own: Tensor | None = None  # what the job's own model makes of the segment, to verify


class Pack:
    """Serves the jobs on one base."""

    def __init__(
        self,
        mode: str,
        max_jobs: int | None,
        verify: float,
        base: Base | None = None,
    ) -> None:
        """Make an empty pack.

        Args:
            mode: `exact` or `bmm`, see `FusedLinear`.
            max_jobs: at once; None: as many as memory holds, told when the first job joins.
            verify: the share of passes that are made again for one job alone, see `Verification`.
            base: loaded already; None: by the first job.
        """
        self.mode, self.max_jobs = mode, max_jobs
        # the first job measures the base for all; the others begin when it has
        self.hub = Hub(self, 1, ROOM[device().partition(":")[0]])
        self.tapes: dict[int, list[Tape]] = {}
        self.members: dict[int, Member] = {}
        self.verification = Verification(verify if mode == "exact" else 0, self.members)
        self.held: dict[int, int] = {}  # bytes that each job takes beside the base, estimated
        self.free, self.wide = 0, False
        self.passes = {"forward": 0, "backward": 0, "most jobs": 0, "products": 0, "together": 0}
        self.measured: dict[str, Any] = {}  # what jobs need not measure again
        self.counted = [0]  # tokens of training passes; a list, for others to watch
        self._base = base
        self._fused: FusedBody | None = None

    def base(self, cfg: DictConfig) -> Base:
        """Return a copy of the base that shares its weights; the first job loads it."""
        if self._base is None:
            reset_peak()
            self._base = base_of(cfg)
        self.free = self.free or free_bytes()
        gc.freeze()  # what is there stays; trainers collect garbage, and would walk over it
        return share(self._base)

    def join(self, job: int, trainer: Any) -> None:
        """Put a trainer's body and backward in step with the others, if its adapter allows it."""
        model = trainer.model.get_base_model()
        body = model.base_model
        assert self._base is not None
        why = unfusable(self._base.model) or foreign(model)
        if getattr(trainer.args, "activation_offloading", False):
            why = "activation_offloading moves what a pass keeps"
        if why:
            log.info("lockstep: this job shares the base but no pass: %s", why)
            return
        if self._fused is None:
            self._fused = FusedBody(self._base.model.base_model, self.mode)
        self.held[job] = training_bytes(trainer)
        if self.wide:
            self.widen()
        self._fused.attach(job, body)
        self.tapes[job] = []
        self.members[job] = Member(body, body.forward, adapters(body))
        body.forward = self._meeting(job, body)
        backward = trainer.accelerator.backward

        def meet(loss: Tensor, **options: Any) -> None:
            self.widen()
            try:
                backward(loss, **options)
                tapes = self.tapes[job]
                if tapes:  # those of the same passes go back together
                    kind = ("backward", *(id(tape.made) for tape in tapes))
                    self.hub.ask(job, kind, tapes[-1].segment.tokens, 1, None)
            finally:
                self._drop(job)

        trainer.accelerator.backward = meet

    def widen(self) -> None:
        """Let as many jobs begin as may: by memory, as many as the largest would fit so far."""
        self.wide = True
        fitting = int(0.8 * self.free / max(self.held.values(), default=self.free))
        self.hub.width = self.max_jobs or max(1, fitting)

    def _drop(self, job: int) -> None:
        """Forget what led back to a job's adapter."""
        for tape in self.tapes[job]:
            tape.made.remove(tape)
        self.tapes[job].clear()

    def leave(self, job: int) -> None:
        """Forget a job."""
        if self.tapes.get(job):
            for tape in self.tapes[job]:
                if tape.mode.checkpointing:  # the pass cannot be recomputed without its adapter
                    unmade(tape.made)
            self._drop(job)
        self.held.pop(job, None)
        self.tapes.pop(job, None)
        self.members.pop(job, None)
        if self._fused is not None:
            self._fused.detach(job)
            self._fused.classes.keep()

    def report(self) -> dict[str, Any]:
        """Return what the passes so far can say about themselves, for a job's record."""
        shared = self.passes["together"] / max(1, self.passes["products"])
        return {**self.verification.report(), "products_together": round(shared, 4)}

    def _meeting(self, job: int, body: Any) -> Callable[..., Any]:
        own = body.forward
        layers = [m for m in body.modules() if hasattr(m, "gradient_checkpointing")]

        def forward(
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
            **rest: Any,
        ) -> Any:
            given = {
                "input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids, "past_key_values": past_key_values,
                "use_cache": use_cache, **rest,
            }  # fmt: skip
            if job in self.verification.apart or not simple(given):
                return own(**given)
            grad = torch.is_grad_enabled()
            checkpointing = grad and any(m.gradient_checkpointing and m.training for m in layers)
            mode = Mode(Precision.now(), body.training, checkpointing)
            request = {
                "input_ids_BS": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids, "past": past_key_values,
            }  # fmt: skip
            hidden = self.hub.ask(job, mode, given["input_ids"].numel(), 0, request)
            if hidden is None:
                return own(**given)
            return BaseModelOutputWithPast(hidden, past_key_values)

        return forward

    def serve(self, requests: list[Request]) -> list[Any]:
        """Answer requests of one kind; see `Server`."""
        kind = requests[0].kind
        if isinstance(kind, Mode):
            return self._forward(requests, kind)
        return self._backward(requests)

    def _forward(self, requests: list[Request], mode: Mode) -> list[Any]:
        """Return each job's hidden states, or None where it must run its body itself."""
        assert self._fused is not None
        if not self._fused.enter(mode):
            return [None] * len(requests)
        segments = [Segment(job=r.job, random=r.random, **r.payload) for r in requests]
        drawn = [copy.copy(s) for s in segments]
        places = self._distinct(drawn) if not mode.precision.grad else list(range(len(drawn)))
        computed = sorted(set(places))
        passed = self._passed([drawn[i] for i in computed], [segments[i] for i in computed], mode)
        hidden_of = dict(zip(computed, passed, strict=True))
        self.passes["forward"] += 1
        self.passes["most jobs"] = max(self.passes["most jobs"], len(computed))
        made: list[Tape] = []
        answers = []
        for place, request, before, after in zip(places, requests, segments, drawn, strict=True):
            hidden, own = hidden_of[place]
            request.random = after.random
            if hidden.requires_grad:
                self.counted[0] += after.tokens
                leaf = hidden.detach().requires_grad_()
                made.append(Tape(made, before, mode, hidden, leaf, own))
                self.tapes[request.job].append(made[-1])
                hidden = leaf
            answers.append(hidden if place == requests.index(request) else hidden.clone())
        return answers

    def _passed(
        self, segments: list[Segment], before: list[Segment], mode: Mode
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return each segment's hidden states, and of verified ones those of the job's own model.

        Args:
            segments: draw random numbers and fill their caches.
            before: the same ones, which stay as they are.
            mode: of the pass.
        """
        assert self._fused is not None
        lengths = [s.past.get_seq_length() if s.past is not None else 0 for s in segments]
        passed: list[tuple[Tensor, Tensor | None]] = []
        try:
            for p in self._fused.passes(segments):
                check = self.verification.choose(mode, p)
                hidden = self._fused.forward(p)
                own: list[Tensor | None] = [None] * len(hidden)
                if check is not None:
                    since = before[len(passed) : len(passed) + len(hidden)]
                    own[check.place] = self.verification.verify(
                        check, since, hidden[check.place], mode, self._fused
                    )
                passed += zip(hidden, own, strict=True)
                together, products = self._fused.products(p)
                self.passes["together"] += together
                self.passes["products"] += products
        except BaseException:
            for s, length in zip(segments, lengths, strict=True):
                if s.past is not None:
                    s.past.crop(length)
            raise
        finally:
            torch.clear_autocast_cache()
        return passed

    def _distinct(self, segments: list[Segment]) -> list[int]:
        """Return, for each segment, the place of the first that asks the bare base the same."""
        assert self._fused is not None
        places: list[int] = []
        for i, s in enumerate(segments):
            same = (
                j
                for j in set(places)
                if s.past is None and self._fused.is_bare(s.job) and s.asks(segments[j])
                and self._fused.is_bare(segments[j].job)
            )  # fmt: skip
            places.append(min(same, default=i))
        return places

    def _backward(self, requests: list[Request]) -> list[None]:
        """Bring each job's gradients from its hidden states to its adapter."""
        jobs = [r.job for r in requests]
        trained = [p for job in jobs for p in self.members[job].trained.values()]
        parameters = [p for p in trained if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        tapes = {job: [t for t in self.tapes[job] if t.leaf.grad is not None] for job in jobs}
        try:
            for turn in range(max(map(len, tapes.values()))):  # the last pass first, as autograd
                own = [own[-1 - turn] for own in tapes.values() if turn < len(own)]
                self._back(own, parameters)
        except BaseException:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
            for own in tapes.values():
                unmade(own)
            raise
        self.passes["backward"] += 1
        for p, grad in zip(parameters, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        return [None] * len(jobs)

    def _back(self, tapes: list[Tape], parameters: list[nn.Parameter]) -> None:
        assert self._fused is not None
        again = [t for t in tapes if t.hidden is None]
        for mode in {t.mode for t in again}:
            some = [t for t in again if t.mode == mode]
            self._fused.enter(mode)
            passes = self._fused.passes([copy.copy(t.segment) for t in some])
            made = [hidden for p in passes for hidden in self._fused.forward(p)]
            torch.clear_autocast_cache()
            for tape, hidden in zip(some, made, strict=True):
                tape.hidden = hidden
        ends = [t.hidden for t in tapes if t.hidden is not None]
        checked = [(t, t.own) for t in tapes if t.own is not None]
        earlier = [self.members[t.segment.job].gradients() for t, _ in checked]
        try:
            torch.autograd.backward(ends, [t.leaf.grad for t in tapes], inputs=parameters)
            for (tape, own), before in zip(checked, earlier, strict=True):
                job = tape.segment.job
                self.verification.verify_gradients(job, own, tape.leaf.grad, before)
        finally:
            for tape in tapes:  # the pass's graph is used up, for those not asked for too
                unmade(tape.made)


def unmade(tapes: list[Tape]) -> None:
    """Let go of a graph that cannot be gone back through; the pass is made again when needed."""
    for tape in tapes:
        tape.hidden = tape.own = None


def share(base: Base) -> Base:
    """Return a base of its own tree and tokenizer over the same weights."""
    return Base(
        sharing_copy(base.model),
        copy.deepcopy(base.tokenizer),
        base.path,
        base.revision,
        base.warning,
    )


def adapters(body: Any) -> dict[str, nn.Parameter]:
    """Return the own parameters of a body's LoRA layers, of all their adapters."""
    return {
        f"{name}.{own}": parameter
        for name, layer in body.named_modules()
        if isinstance(layer, LoraLayer)
        for own, parameter in layer.named_parameters()
        if not own.startswith("base_layer.")
    }


def simple(given: dict[str, Any]) -> bool:
    """Say whether a call of the body asks for nothing but hidden states (and its cache filled)."""
    given = {k: v for k, v in given.items() if v is not None and v is not False}
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    known = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache",
             "return_dict", "num_items_in_batch"}  # fmt: skip
    return (
        set(given) <= known
        and "input_ids" in given
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and (past is None or type(past) is DynamicCache)
        and not (given.get("use_cache") and past is None)
        and not torch.is_inference_mode_enabled()
    )
