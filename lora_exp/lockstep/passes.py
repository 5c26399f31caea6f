"""The passes of a pack: requests of several jobs, computed as one forward and one backward.

The graph is cut at the hidden states. Each job runs the backward of its own loss up to them; from
there one backward through the base serves all jobs. So a pass that fails can be repeated.
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
from lora_exp.lockstep.eligibility import described
from lora_exp.lockstep.hub import Request, out_of_memory
from lora_exp.lockstep.outputs import cut, snapshot
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import PassContext, Segment, jobs_that_read_padding
from lora_exp.lockstep.state import PLAIN
from lora_exp.lockstep.verification import Member, Verification

log = logging.getLogger("lora_exp")


@dataclass(eq=False)
class Tape:
    """A job's part of the graph of a pass, from its hidden states to its adapter."""

    siblings: list[Tape]  # the tapes of the same pass, whose graph they share
    segment: Segment  # before the pass drew random numbers
    context: PassContext
    ends: list[Tensor] | None  # hidden states, router logits; None: dropped, to be computed again
    leaves: list[Tensor]  # detached copies, given to the job; where its own backward ends
    size: int  # of the request; those of a pass that was served as one fit into one backward
    reference: list[Tensor] | None = None  # the same of the job's own model, if verified

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the job's loss."""
        return [leaf.grad for leaf in self.leaves]


class Passes:
    """Runs forward and backward for several jobs at once: the hub's server."""

    def __init__(self, mode: str, verify: float) -> None:
        """Create it without jobs; see `Pack`."""
        self.mode = mode
        self.fused: FusedBody | None = None
        self.members: dict[int, Member] = {}  # the jobs' own models, to repeat a pass alone
        self.tapes: dict[int, list[Tape]] = {}  # of each job's passes before their backward
        self.verification = Verification(verify if mode == "exact" else 0, self.members)
        self.counts = {"forward": 0, "backward": 0, "most jobs": 0, "products": 0, "together": 0,
                       "shared forward": 0, "shared backward": 0, "repeated": 0,
                       "tokens": 0, "padding left out": 0}  # fmt: skip
        self.sharing: set[int] = set()  # jobs that have shared a pass in training
        self.trained_tokens = [0]  # of training passes so far; a list, which the table reads

    def add(self, job: int, body: Any, base: Any, reads_padding: bool) -> None:
        """Add a job.

        Args:
            job: the job's number.
            body: the job's model without its output head, with its adapters.
            base: the body that all jobs share.
            reads_padding: whether its trainer may read hidden states of padding.
        """
        if self.fused is None:
            self.fused = FusedBody(base, self.mode)
        self.members[job] = Member(body, body.forward, adapters(body))
        self.fused.attach(job, body, body.forward)
        if reads_padding:
            self.fused.reads_padding.add(job)
        self.tapes[job] = []

    def drop_tapes(self, job: int) -> None:
        """Drop a job's part of all graphs."""
        for tape in self.tapes[job]:
            # without this job, whose backward failed, its rows cannot be computed again
            if tape.context.checkpointing and tape.ends is not None:
                drop_graph(tape.siblings)
            tape.siblings.remove(tape)
        self.tapes[job].clear()

    def remove(self, job: int) -> None:
        """Remove a job."""
        if self.tapes.get(job):
            self.drop_tapes(job)
        self.tapes.pop(job, None)
        self.members.pop(job, None)
        if self.fused is not None:
            self.fused.detach(job)
            self.fused.classes.save()

    def report(self) -> dict[str, Any]:
        """Return the counts of passes, verifications and shared products so far, for run.json."""
        shared = self.counts["together"] / max(1, self.counts["products"])
        left_out = self.counts["padding left out"] / max(1, self.counts["tokens"])
        return {
            "shared_passes": self.counts["shared forward"],
            "shared_backward_passes": self.counts["shared backward"],
            **self.verification.report(),
            "products_together": round(shared, 4),
            "padding_left_out": round(left_out, 4),
        }

    def why_apart(self, training: bool) -> str | None:
        """Return why jobs share no pass while they train, or are evaluated; None: they do."""
        reasons = self.fused.why_apart.items() if self.fused is not None else ()
        return next((why for context, why in reasons if context.training == training), None)

    def serve(self, requests: list[Request]) -> list[Any]:
        """Answer requests with the same key; see `Server`."""
        batch_key = requests[0].batch_key
        if isinstance(batch_key, PassContext):
            return self._forward(requests, batch_key)
        return self._backward(requests)

    def _forward(self, requests: list[Request], context: PassContext) -> list[Any]:
        """Return each job's hidden states; None if the job must run its own body."""
        assert self.fused is not None
        if not self.fused.enter(context):
            return [None] * len(requests)
        segments = [Segment(r.job, r.payload, r.random) for r in requests]
        advanced = [copy.copy(s) for s in segments]  # the pass draws from their random states
        draws = context.compute_state.grad or context.training  # dropout, from each job's stream
        sources = list(range(len(advanced))) if draws else self._sources(advanced)
        distinct = sorted(set(sources))
        started = [segments[i] for i in distinct]
        try:
            results = self._run([advanced[i] for i in distinct], started, context)
        except Exception as error:
            if isinstance(error, Unmeasured):
                self.fused.distrust(context, str(error))
            elif len(requests) > 1 or out_of_memory(error):
                raise  # the hub serves fewer at once
            else:  # the job's own forward, if it fails too, shows where
                log.debug("lockstep: a pass of one job failed", exc_info=True)
                self.fused.distrust(context, described(error))
            return [None] * len(requests)
        result_of = dict(zip(distinct, results, strict=True))
        self.counts["forward"] += 1
        self.counts["most jobs"] = max(self.counts["most jobs"], len(distinct))
        siblings, answers = list[Tape](), list[Any]()
        for i, (source, request) in enumerate(zip(sources, requests, strict=True)):
            output, reference = result_of[source]
            request.random = advanced[i].random
            ends: list[Tensor] = []
            leaves: list[Tensor] = []
            # jobs that share a result may write into it
            answer = output if source == i else copy.deepcopy(output)
            answer = cut(answer, ends, leaves)
            segments[i].kept = advanced[i].kept
            if ends:
                self.trained_tokens[0] += advanced[i].own_tokens
                tape = Tape(siblings, segments[i], context, ends, leaves, request.size, reference)
                siblings.append(tape)
                self.tapes[request.job].append(tape)
            answers.append(answer)
        return answers

    def _run(
        self, segments: list[Segment], before: list[Segment], context: PassContext
    ) -> list[tuple[Any, list[Tensor] | None]]:
        """Return the segments' outputs, and for verified ones the ends of the job's own graph.

        Args:
            segments: the pass advances their random states and fills their caches.
            before: copies that keep their random states.
            context: of the pass.
        """
        assert self.fused is not None
        caches = [snapshot(s.past) for s in segments]
        results: list[tuple[Any, list[Tensor] | None]] = []
        try:
            for p in self.fused.passes(segments):
                check = self.verification.choose(context, p)
                outputs = self.fused.forward(p)
                self.counts["shared forward"] += len(outputs) > 1
                if len(outputs) > 1 and context.training:
                    self.sharing |= {s.job for s in p.segments}
                self.counts["tokens"] += sum(s.own_tokens for s in p.segments)
                left_out = (s.own_tokens - s.tokens for s in p.segments)
                self.counts["padding left out"] += sum(left_out)
                reference: list[list[Tensor] | None] = [None] * len(outputs)
                if check is not None:
                    since = before[len(results) : len(results) + len(outputs)]
                    reference[check.index] = self.verification.verify(
                        check, since, outputs[check.index], context, self.fused
                    )
                results += zip(outputs, reference, strict=True)
                together, products = self.fused.count_products(p)
                self.counts["together"] += together
                self.counts["products"] += products
        except BaseException:
            for cached in caches:
                cached()
            raise
        finally:
            torch.clear_autocast_cache()
        return results

    def _sources(self, segments: list[Segment]) -> list[int]:
        """Return the index of each segment's source: the first with equal inputs, adapters off."""
        assert self.fused is not None
        sources: list[int] = []
        for i, s in enumerate(segments):
            same = (
                j
                for j in set(sources)
                if s.past is None and self.fused.adapter_is_off(s.job)
                and s.equals_request(segments[j]) and self.fused.adapter_is_off(segments[j].job)
            )  # fmt: skip
            sources.append(min(same, default=i))
        return sources

    def _backward(self, requests: list[Request]) -> list[None]:
        """Run the backward of the jobs' passes, from the hidden states to the adapters."""
        jobs = [r.job for r in requests]
        trained = [p for job in jobs for p in self.members[job].trained.values()]
        parameters = [p for p in trained if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        tapes = {
            job: [t for t in self.tapes[job] if any(g is not None for g in t.gradients())]
            for job in jobs
        }
        try:
            for turn in range(max(map(len, tapes.values()))):  # the last pass first, as in autograd
                latest = [own[-1 - turn] for own in tapes.values() if turn < len(own)]
                self._backward_once(latest, parameters)
        except BaseException:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
            for job_tapes in tapes.values():
                drop_graph(job_tapes)
            raise
        self.counts["backward"] += 1
        self.counts["shared backward"] += sum(bool(own) for own in tapes.values()) > 1
        for p, grad in zip(parameters, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        return [None] * len(jobs)

    def _backward_once(self, tapes: list[Tape], parameters: list[nn.Parameter]) -> None:
        assert self.fused is not None
        dropped = [t for t in tapes if t.ends is None]
        for context in {t.context for t in dropped}:
            batch = [t for t in dropped if t.context == context]
            self.fused.enter(context)
            parts = self.fused.passes([copy.copy(t.segment) for t in batch])
            self.counts["repeated"] += len(parts)
            outputs = [output for p in parts for output in self.fused.forward(p)]
            torch.clear_autocast_cache()
            for tape, output in zip(batch, outputs, strict=True):
                tape.ends = []
                cut(output, tape.ends, [])
        PLAIN.restore()  # backward runs outside autocast, as in a run alone
        roots = [
            (end, leaf.grad)
            for t in tapes
            for end, leaf in zip(t.ends or (), t.leaves, strict=True)
            if leaf.grad is not None
        ]
        for job in jobs_that_read_padding((t.segment, g) for t in tapes for g in t.gradients()):
            self.verification.record_difference(job, "its loss depends on padding")
        checked = [(t, t.reference) for t in tapes if t.reference is not None]
        earlier = [self.members[t.segment.job].gradients() for t, _ in checked]
        try:
            gradients = [gradient for _, gradient in roots]
            torch.autograd.backward([end for end, _ in roots], gradients, inputs=parameters)
            for (tape, reference), before in zip(checked, earlier, strict=True):
                self.verification.verify_gradients(
                    tape.segment.job, reference, tape.gradients(), before, self.fused
                )
        finally:
            for tape in tapes:  # the graph is used up, also for siblings without a request
                drop_graph(tape.siblings)


def drop_graph(tapes: list[Tape]) -> None:
    """Drop the graph of a pass; the pass is repeated when its backward is needed."""
    for tape in tapes:
        tape.ends = tape.reference = None


def adapters(body: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of all adapters of a body, by name; not those of the base."""
    return {
        f"{name}.{weight}": parameter
        for name, layer in body.named_modules()
        if isinstance(layer, LoraLayer)
        for weight, parameter in layer.named_parameters()
        if not weight.startswith("base_layer.")
    }
