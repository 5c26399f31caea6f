"""The passes of a pack: what jobs ask for together, made as one forward and one backward.

The graph is cut at the hidden states. A job's own loss goes back to them by itself; from there the
pack goes back through the base for all jobs at once. So a pass that fails can be made again.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.hub import Request
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import Mode, Segment
from lora_exp.lockstep.state import PLAIN
from lora_exp.lockstep.verification import Member, Verification

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


class Passes:
    """Runs forward and backward for several jobs at once."""

    def __init__(self, mode: str, verify: float) -> None:
        """Make no pass yet; see `Pack`."""
        self.mode = mode
        self.fused: FusedBody | None = None
        self.members: dict[int, Member] = {}
        self.tapes: dict[int, list[Tape]] = {}  # of each job's passes that have not gone back
        self.verification = Verification(verify if mode == "exact" else 0, self.members)
        self.made = {"forward": 0, "backward": 0, "most jobs": 0, "products": 0, "together": 0}
        self.counted = [0]  # tokens of training passes; a list, for others to watch

    def take(self, job: int, body: Any, base: Any) -> None:
        """Let a job's body take part.

        Args:
            job: its number.
            body: of the job's model, adapters on it.
            base: the body that all jobs share.
        """
        if self.fused is None:
            self.fused = FusedBody(base, self.mode)
        self.fused.attach(job, body)
        self.tapes[job] = []
        self.members[job] = Member(body, body.forward, adapters(body))

    def drop(self, job: int) -> None:
        """Forget what led back to a job's adapter."""
        for tape in self.tapes[job]:
            tape.made.remove(tape)
        self.tapes[job].clear()

    def leave(self, job: int) -> None:
        """Forget a job."""
        if self.tapes.get(job):
            for tape in self.tapes[job]:
                if tape.mode.checkpointing:  # the pass cannot be recomputed without its adapter
                    drop_graph(tape.made)
            self.drop(job)
        self.tapes.pop(job, None)
        self.members.pop(job, None)
        if self.fused is not None:
            self.fused.detach(job)
            self.fused.classes.keep()

    def report(self) -> dict[str, Any]:
        """Return what the passes so far can say about themselves, for a job's record."""
        shared = self.made["together"] / max(1, self.made["products"])
        return {**self.verification.report(), "products_together": round(shared, 4)}

    def serve(self, requests: list[Request]) -> list[Any]:
        """Answer requests of one kind; see `Server`."""
        kind = requests[0].kind
        if isinstance(kind, Mode):
            return self._forward(requests, kind)
        return self._backward(requests)

    def _forward(self, requests: list[Request], mode: Mode) -> list[Any]:
        """Return each job's hidden states, or None where it must run its body itself."""
        assert self.fused is not None
        if not self.fused.enter(mode):
            return [None] * len(requests)
        segments = [Segment(job=r.job, random=r.random, **r.payload) for r in requests]
        drawn = [copy.copy(s) for s in segments]
        places = self._distinct(drawn) if not mode.precision.grad else list(range(len(drawn)))
        computed = sorted(set(places))
        started = [segments[i] for i in computed]
        try:
            passed = self._passed([drawn[i] for i in computed], started, mode)
        except Unmeasured as error:
            log.info("lockstep: jobs share no pass any more: %s", error)
            self.fused.proven[mode] = False
            return [None] * len(requests)
        hidden_of = dict(zip(computed, passed, strict=True))
        self.made["forward"] += 1
        self.made["most jobs"] = max(self.made["most jobs"], len(computed))
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
        assert self.fused is not None
        lengths = [s.past.get_seq_length() if s.past is not None else 0 for s in segments]
        passed: list[tuple[Tensor, Tensor | None]] = []
        try:
            for p in self.fused.passes(segments):
                check = self.verification.choose(mode, p)
                hidden = self.fused.forward(p)
                own: list[Tensor | None] = [None] * len(hidden)
                if check is not None:
                    since = before[len(passed) : len(passed) + len(hidden)]
                    own[check.place] = self.verification.verify(
                        check, since, hidden[check.place], mode, self.fused
                    )
                passed += zip(hidden, own, strict=True)
                together, products = self.fused.products(p)
                self.made["together"] += together
                self.made["products"] += products
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
        assert self.fused is not None
        places: list[int] = []
        for i, s in enumerate(segments):
            same = (
                j
                for j in set(places)
                if s.past is None and self.fused.is_bare(s.job) and s.asks(segments[j])
                and self.fused.is_bare(segments[j].job)
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
                drop_graph(own)
            raise
        self.made["backward"] += 1
        for p, grad in zip(parameters, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        return [None] * len(jobs)

    def _back(self, tapes: list[Tape], parameters: list[nn.Parameter]) -> None:
        assert self.fused is not None
        again = [t for t in tapes if t.hidden is None]
        for mode in {t.mode for t in again}:
            some = [t for t in again if t.mode == mode]
            self.fused.enter(mode)
            parts = self.fused.passes([copy.copy(t.segment) for t in some])
            made = [hidden for p in parts for hidden in self.fused.forward(p)]
            torch.clear_autocast_cache()
            for tape, hidden in zip(some, made, strict=True):
                tape.hidden = hidden
        PLAIN.restore()  # backward runs outside autocast, as in a run alone
        ends = [t.hidden for t in tapes if t.hidden is not None]
        checked = [(t, t.own) for t in tapes if t.own is not None]
        earlier = [self.members[t.segment.job].gradients() for t, _ in checked]
        try:
            torch.autograd.backward(ends, [t.leaf.grad for t in tapes], inputs=parameters)
            for (tape, own), before in zip(checked, earlier, strict=True):
                job = tape.segment.job
                assert tape.leaf.grad is not None
                self.verification.verify_gradients(job, own, tape.leaf.grad, before, self.fused)
        finally:
            for tape in tapes:  # the pass's graph is used up, for those not asked for too
                drop_graph(tape.made)


def drop_graph(tapes: list[Tape]) -> None:
    """Drop the graph of a pass; the pass is made again when its backward is needed."""
    for tape in tapes:
        tape.hidden = tape.own = None


def adapters(body: Any) -> dict[str, nn.Parameter]:
    """Return the own parameters of a body's LoRA layers, of all their adapters."""
    return {
        f"{name}.{own}": parameter
        for name, layer in body.named_modules()
        if isinstance(layer, LoraLayer)
        for own, parameter in layer.named_parameters()
        if not own.startswith("base_layer.")
    }
