"""Verification while a pack trains: a pass made again for one job alone, compared bit for bit.

Classes are measured with rows of their own; this holds what a pass really computed against what the
job's own model computes of the same rows.
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

from lora_exp.lockstep.eligibility import keeping_random
from lora_exp.lockstep.segment import Mode, Pass, Segment, split

log = logging.getLogger("lora_exp")
Gradients = dict[str, Tensor | None]  # by a parameter's name
BUDGET = 0.01  # of the tokens of all passes, for products that are verified because they are new


@dataclass(frozen=True)
class Member:
    """A job's own model, as it computes without the pack."""

    body: Any
    compute: Callable[..., Any]  # the body's own forward
    trained: dict[str, nn.Parameter]

    def alone(self, segment: Segment, past: Any, mode: Mode) -> Any:
        """Return the body's output for a segment, drawing what the job alone would have drawn."""
        with keeping_random():
            mode.precision.restore()
            segment.random.restore()
            try:
                return self.compute(
                    input_ids=segment.input_ids_BS,
                    attention_mask=segment.attention_mask,
                    position_ids=segment.position_ids,
                    past_key_values=past,
                    use_cache=past is not None,
                )
            finally:
                torch.clear_autocast_cache()

    def gradients(self) -> Gradients:
        """Return copies of the gradients that are there."""
        grads = {name: p.grad for name, p in self.trained.items() if p.requires_grad}
        return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


@dataclass(frozen=True)
class Check:
    """A segment of a pass that is to be verified."""

    place: int  # in the pass
    past: Any  # its key-value cache as it was before
    keys: frozenset[Any]  # what this is the first check of


class Verification:
    """Chooses which passes are verified, compares, and notes what differs."""

    def __init__(self, share: float, members: dict[int, Member]) -> None:
        """Verify a share of the passes, and those with products that were not verified before.

        Args:
            share: 0: none; 1: every pass, of one job each; between: products that no verified pass
                had come first, as long as that costs no more than `BUDGET` of all tokens.
            members: the jobs of the pack, as they come and go.
        """
        self.share, self.members = share, members
        self.tell: Callable[[list[int], str], None] = _log  # hears of each difference
        self.passes = self.verified = 0
        self.apart: set[int] = set()  # jobs that share no pass any more, since one differed
        self.together: set[int] = set()  # jobs that have shared one
        self.differences: list[str] = []
        self._known: set[Any] = set()  # keys of what was verified
        self._tokens = [0, 0]  # of all passes, and of verified segments
        self._turns = random.Random(0)

    def report(self) -> dict[str, Any]:
        """Return what is known so far, for a job's record."""
        return {
            "passes": self.passes,
            "verified": self.verified,
            "differences": self.differences[:],
            "proven": not self.differences,
        }

    def choose(self, mode: Mode, p: Pass) -> Check | None:
        """Return whose rows of a pass are verified, if any are.

        Args:
            mode: of the pass.
            p: the pass, not yet made.
        """
        self.passes += 1
        if len(p.segments) > 1:
            self.together |= {s.job for s in p.segments}
        self._tokens[0] += sum(p.sizes)
        if not self.share:
            return None
        due, turn = self._turns.random() < self.share, self._turns.randrange(len(p.segments))
        keys = [
            frozenset({(mode, key) for key in p.products_of(i)}) for i in range(len(p.segments))
        ]
        new = [i for i, own in enumerate(keys) if not own <= self._known]
        first = not any(mode == known for known, _ in self._known)
        place = new[0] if new else turn
        cost = self._tokens[1] + p.segments[place].tokens
        if not (due or first or (new and cost <= BUDGET * self._tokens[0])):
            return None
        past = p.segments[place].past
        if past is not None:
            past = copy.deepcopy(past)
        return Check(place, past, keys[place])

    def verify(
        self, check: Check, before: list[Segment], hidden: Tensor, mode: Mode, fused: Any
    ) -> Tensor | None:
        """Hold a job's hidden states against those of its own model.

        Args:
            check: whose.
            before: all segments of the pass, as they were before it.
            hidden: what the pass made of the job's, [B, S, C].
            mode: of the pass.
            fused: the `FusedBody` that made it.

        Returns:
            The own model's, which lead to its gradients; None where there are none, or where it
            could not be made, which costs the verification, not the pass.
        """
        s = before[check.place]
        try:
            own: Tensor = self.members[s.job].alone(s, check.past, mode).last_hidden_state
        except Exception as error:  # often too little memory: the pass itself is there
            log.info("lockstep: a pass is not verified: %s", error)
            return None
        self.verified += 1
        self._tokens[1] += s.tokens
        self._known |= check.keys
        ours, theirs = hidden, own
        if s.attention_mask is not None:  # what padding becomes is nobody's
            counted = s.attention_mask[:, -s.input_ids_BS.shape[1] :].bool()
            ours, theirs = hidden[counted], own[counted]
        if count := different(ours, theirs):
            fused.classes.forget()
            self._differ(s.job, f"{count} of {ours.numel()} hidden values differ")
            try:
                where = _first_layer(check, before, self.members[s.job], mode, fused)
            except Exception as error:  # the difference is told already
                where = f"its layer is not known ({error})"
            self._differ(s.job, where)
            return None
        return own if own.requires_grad else None

    def verify_gradients(
        self, job: int, own: Tensor, gradient: Tensor, before: Gradients, fused: Any
    ) -> None:
        """Hold what a job's gradients became against what its own model adds to them.

        Args:
            job: whose.
            own: the hidden states of its own model, [B, S, C].
            gradient: of the job's loss, in the hidden states; of the same shape.
            before: the job's gradients before the pass went back.
            fused: the `FusedBody` that made the pass.
        """
        trained = self.members[job].trained
        try:
            parameters = [trained[name] for name in before]
            added: Sequence[Tensor | None] = torch.autograd.grad(
                own, parameters, gradient, allow_unused=True
            )
        except Exception as error:
            log.info("lockstep: gradients are not verified: %s", error)
            return
        for (name, was), grad in reversed(list(zip(before.items(), added, strict=True))):
            expected = grad if was is None else was if grad is None else was + grad
            if expected is not None and (count := different(trained[name].grad, expected)):
                fused.classes.forget()
                text = f"{count} of {expected.numel()} gradients of {name} differ"
                self._differ(job, f"{text}, those of later layers do not")
                return

    def _differ(self, job: int, what: str) -> None:
        """Record that a pass differs from the run alone; the job shares no pass from here on."""
        self.apart.add(job)
        self.differences.append(f"pass {self.passes}: {what}")
        self.tell(sorted(self.together | {job}), self.differences[-1])


def _log(jobs: list[int], what: str) -> None:
    log.error("lockstep: jobs %s are not proven equal to their runs alone: %s", jobs, what)


def different(ours: Tensor | None, theirs: Tensor) -> int:
    """Return how many numbers differ in a bit; NaN equals NaN, and zero the negative zero."""
    if ours is None:
        return theirs.numel()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[ours.element_size()]
    one, other = (t.detach().contiguous().view(bits) for t in (ours, theirs))
    alike = ((ours == 0) & (theirs == 0)) | (ours.isnan() & theirs.isnan())
    return int(((one != other) & ~alike).sum())


def _first_layer(
    check: Check, before: list[Segment], member: Member, mode: Mode, fused: Any
) -> str:
    """Repeat the pass and the job's own forward, and name the first layer that differs."""
    s = before[check.place]
    if any(one.past is not None for one in before):
        return "its layer is not known: a cache is not filled twice"
    (p,) = fused.passes([copy.copy(one) for one in before])
    theirs: dict[str, Tensor] = {}
    ours: list[str] = []

    def keep(name: str, output: Tensor) -> None:
        theirs[name] = output.detach().clone()

    def compare(name: str, output: Tensor) -> None:
        own = theirs.pop(name, None)
        if own is not None and not ours and output.shape[:2] == (1, sum(p.sizes)):
            part = split(output, p.sizes)[check.place]
            if part.numel() == own.numel() and different(part.reshape(own.shape), own):
                ours.append(name)

    with keeping_random():
        with _outputs(member.body, keep):
            member.alone(s, None, mode)
        with _outputs(fused.body, compare):
            fused.forward(p)
    return f"the first layer is {ours[0]}" if ours else "no layer differs when it is made again"


@contextmanager
def _outputs(body: nn.Module, hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hear what each layer puts out, in the order in which they end."""

    def heard(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2:
            hear(name, output)

    handles = [
        module.register_forward_hook(lambda _m, _x, output, name=name: heard(name, output))
        for name, module in body.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
