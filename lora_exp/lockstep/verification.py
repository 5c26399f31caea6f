"""Verification while a pack trains: a pass is repeated for one job alone, and compared bit for bit.

Classes are measured with artificial rows; this compares what a pass has really computed with what
the job's own model computes from the same rows.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.lockstep.eligibility import preserved_random_state
from lora_exp.lockstep.outputs import tensors_of, without_padding
from lora_exp.lockstep.segment import Pass, PassContext, Segment, split

log = logging.getLogger("lora_exp")
Gradients = dict[str, Tensor | None]  # by a parameter's name
BUDGET = 0.01  # share of all tokens that may be spent on verifying new products


@dataclass(frozen=True)
class Member:
    """A job's own model, which computes without the pack."""

    body: Any
    forward: Callable[..., Any]  # the body's own forward
    trained: dict[str, nn.Parameter]

    def forward_alone(self, segment: Segment, past: Any, context: PassContext) -> Any:
        """Return the body's output for a segment, with the random numbers of the run alone."""
        with preserved_random_state():
            context.compute_state.restore()
            segment.random.restore()
            try:
                return self.forward(**segment.arguments_with(past))
            finally:
                torch.clear_autocast_cache()

    def gradients(self) -> Gradients:
        """Return copies of the current gradients."""
        grads = {name: p.grad for name, p in self.trained.items() if p.requires_grad}
        return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


@dataclass(frozen=True)
class Check:
    """The segment of a pass to be verified."""

    index: int  # in the pass
    past: Any  # its key-value cache as it was before
    keys: frozenset[Any]  # products that this check covers


class Verification:
    """Chooses which passes are verified, compares them, and records differences."""

    def __init__(self, fraction: float, members: dict[int, Member]) -> None:
        """Verify a fraction of the passes, and passes with products that were not verified before.

        Args:
            fraction: 0: none; 1: every pass, one job of each; between: also passes with new
                products, as long as these cost at most `BUDGET` of all tokens.
            members: the pack's current jobs; the pack changes this dict.
        """
        self.fraction, self.members = fraction, members
        self.on_difference: Callable[[list[int], str], None] = _log  # called for each difference
        self.passes = self.verified = 0
        self.excluded: set[int] = set()  # jobs that differed once and share no further pass
        self.shared_jobs: set[int] = set()  # jobs that have shared a pass
        self.differences: list[str] = []
        self._verified_keys: set[Any] = set()  # products verified so far
        self._tokens = [0, 0]  # of all passes, and of verified segments
        self._random = random.Random(0)

    def report(self) -> dict[str, Any]:
        """Return the results so far, for run.json."""
        return {
            "passes": self.passes,
            "verified": self.verified,
            "differences": self.differences[:],
            "proven": not self.differences if self.fraction or self.differences else None,
        }

    def choose(self, context: PassContext, p: Pass) -> Check | None:
        """Return the segment of a pass to verify, if any.

        Args:
            context: of the pass.
            p: the pass, before it is computed.
        """
        self.passes += 1
        if len(p.segments) > 1:
            self.shared_jobs |= {s.job for s in p.segments}
        self._tokens[0] += sum(p.sizes)
        if not self.fraction:
            return None
        due, drawn = self._random.random() < self.fraction, self._random.randrange(len(p.segments))
        keys = [
            frozenset({(context, key) for key in p.products_of(i)}) for i in range(len(p.segments))
        ]
        new = [i for i, own in enumerate(keys) if not own <= self._verified_keys]
        first = not any(context == verified for verified, _ in self._verified_keys)
        index = new[0] if new else drawn
        cost = self._tokens[1] + p.segments[index].own_tokens
        if not (due or first or (new and cost <= BUDGET * self._tokens[0])):
            return None
        past = p.segments[index].past
        if past is not None:
            past = copy.deepcopy(past)
        return Check(index, past, keys[index])

    def verify(
        self, check: Check, before: list[Segment], output: Any, context: PassContext, fused: Any
    ) -> list[Tensor] | None:
        """Compare a job's hidden states, and what else its body returns, with its own model's.

        Args:
            check: the job's segment.
            before: all segments of the pass, in their states before it.
            output: the body's output from the pass.
            context: of the pass.
            fused: the `FusedBody` that computed it.

        Returns:
            The tensors of its own model's output that have a graph; None if there are none or if
            they could not be computed (the pass is then used without verification).
        """
        s = before[check.index]
        try:
            alone = tensors_of(self.members[s.job].forward_alone(s, check.past, context))
        except Exception as error:  # often too little memory; the pass itself has worked
            log.info("lockstep: a pass is not verified: %s", error)
            return None
        self.verified += 1
        self._tokens[1] += s.own_tokens
        self._verified_keys |= check.keys
        pairs = list(zip(tensors_of(output), alone, strict=True))
        differing = [
            (count, actual.numel())
            for actual, expected in pairs
            if (count := count_differences(*(without_padding(s, t) for t in (actual, expected))))
        ]
        if differing:
            count, total = differing[0]
            fused.classes.forget()
            self.record_difference(s.job, f"{count} of {total} hidden values differ")
            try:
                where = _first_layer(check, before, self.members[s.job], context, fused)
            except Exception as error:  # the difference is already recorded
                where = f"its layer is not known ({error})"
            self.record_difference(s.job, where)
            return None
        return [t for t in alone if t.requires_grad] or None

    def verify_gradients(
        self,
        job: int,
        reference: list[Tensor],
        gradients: list[Tensor | None],
        before: Gradients,
        fused: Any,
    ) -> None:
        """Compare a job's gradients with those of its own model.

        Args:
            job: the job's number.
            reference: the tensors of its own model's output that have a graph.
            gradients: of the job's loss with respect to them.
            before: the job's gradients before the backward of the pass.
            fused: the `FusedBody` that computed the pass.
        """
        trained = self.members[job].trained
        try:
            parameters = [trained[name] for name in before]
            roots = [(t, g) for t, g in zip(reference, gradients, strict=True) if g is not None]
            ends, weights = zip(*roots, strict=True)
            added: Sequence[Tensor | None] = torch.autograd.grad(
                ends, parameters, weights, allow_unused=True
            )
        except Exception as error:
            log.info("lockstep: gradients are not verified: %s", error)
            return
        for (name, previous), grad in reversed(list(zip(before.items(), added, strict=True))):
            expected = grad if previous is None else previous if grad is None else previous + grad
            if expected is not None and (count := count_differences(trained[name].grad, expected)):
                fused.classes.forget()
                text = f"{count} of {expected.numel()} gradients of {name} differ"
                self.record_difference(job, f"{text}, those of later layers do not")
                return

    def record_difference(self, job: int, what: str) -> None:
        """Record that a pass differs from the run alone; the job shares no further pass."""
        self.excluded.add(job)
        self.differences.append(f"pass {self.passes}: {what}")
        self.on_difference(sorted(self.shared_jobs | {job}), self.differences[-1])


def _log(jobs: list[int], what: str) -> None:
    log.error("lockstep: jobs %s are not proven equal to their runs alone: %s", jobs, what)


def count_differences(actual: Tensor | None, expected: Tensor) -> int:
    """Return how many numbers differ in a bit; NaN equals NaN, and 0 equals -0."""
    if actual is None:
        return expected.numel()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[actual.element_size()]
    one, other = (t.detach().contiguous().view(integers) for t in (actual, expected))
    equal = ((actual == 0) & (expected == 0)) | (actual.isnan() & expected.isnan())
    return int(((one != other) & ~equal).sum())


def _first_layer(
    check: Check, before: list[Segment], member: Member, context: PassContext, fused: Any
) -> str:
    """Repeat the pass and the job's own forward, and name the first layer that differs."""
    if fused.own_layers.get(context):
        return "its layer is not known: each job runs its own layers"
    s = before[check.index]
    if any(segment.past is not None for segment in before):
        return "its layer is not known: a cache cannot be filled twice"
    (p,) = fused.passes([copy.copy(segment) for segment in before])
    expected: dict[str, Tensor] = {}
    differing: list[str] = []  # at most the first layer

    def store(name: str, output: Tensor) -> None:
        expected[name] = output.detach().clone()

    def compare(name: str, output: Tensor) -> None:
        reference = expected.pop(name, None)
        if reference is not None and not differing and output.shape[:2] == (1, sum(p.sizes)):
            part, own = split(output, p.sizes)[check.index], p.segments[check.index]
            if reference.shape[:2] == own.input_ids_BS.shape:
                reference = own.flat(reference)
            if part.numel() == reference.numel() and count_differences(
                part.reshape(reference.shape), reference
            ):
                differing.append(name)

    with preserved_random_state():
        with _watching_outputs(member.body, store):
            member.forward_alone(s, None, context)
        with _watching_outputs(fused.body, compare):
            fused.forward(p)
    if not differing:
        return "no layer differs when the pass is repeated"
    return f"the first layer is {differing[0]}"


@contextmanager
def _watching_outputs(body: nn.Module, callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call back with each layer's output, in the order in which the layers end."""

    def hook(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2:
            callback(name, output)

    handles = [
        module.register_forward_hook(lambda _m, _x, output, name=name: hook(name, output))
        for path, module in body.named_modules()
        if (name := path.replace(".base.", "."))  # below what a `FusedBody` has in its place
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
