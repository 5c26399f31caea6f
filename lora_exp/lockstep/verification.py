"""Verification while a pack trains: a pass made again for one job alone, compared bit for bit.

Classes are measured with rows of their own; this holds what a pass really computed against what the
job's own model computes of the same rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.lockstep.eligibility import keeping_random
from lora_exp.lockstep.hub import out_of_memory
from lora_exp.lockstep.segment import Mode, Pass, Segment, split

log = logging.getLogger("lora_exp")
Gradients = dict[str, Tensor | None]  # by a parameter's name


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


class Verification:
    """Chooses which passes are verified, compares, and notes what differs."""

    def __init__(self, share: float, members: dict[int, Member]) -> None:
        """Verify a share of the passes, and the first with each number of rows.

        Args:
            share: 0: none, the first ones neither; 1: every pass.
            members: the jobs of the pack, as they come and go.
        """
        self.share, self.members = share, members
        self.passes = self.verified = 0
        self.apart: set[int] = set()  # jobs that share no pass any more, since one differed
        self.differences: list[str] = []
        self._rows: set[tuple[Mode, str, int]] = set()  # that a verified pass had

    def report(self) -> dict[str, Any]:
        """Return what is known so far, for a job's record."""
        return {
            "passes": self.passes,
            "verified": self.verified,
            "differences": self.differences[:],
        }

    def choose(self, mode: Mode, p: Pass) -> Check | None:
        """Return whose rows of a pass are verified, if any are: the jobs take turns.

        Args:
            mode: of the pass.
            p: the pass, not yet made.
        """
        self.passes += 1
        if not self.share:
            return None
        whole = (mode, "whole", sum(p.sizes))
        own = [(mode, "own", s.tokens) for s in p.segments]
        new = [i for i, key in enumerate(own) if key not in self._rows]
        due = int(self.passes * self.share) > int((self.passes - 1) * self.share)
        if not (new or due or whole not in self._rows):
            return None
        place = new[0] if new else self.passes % len(p.segments)
        self._rows |= {whole, own[place]}
        return Check(place, copy.deepcopy(p.segments[place].past))

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
            The own model's, which lead to its gradients; None where there are none, or memory was
            too short for it.
        """
        s = before[check.place]
        member = self.members[s.job]
        try:
            own: Tensor = member.alone(s, check.past, mode).last_hidden_state
        except Exception as error:
            if out_of_memory(error):
                return None
            raise
        self.verified += 1
        ours, theirs = hidden, own
        if s.attention_mask is not None:  # what padding becomes is nobody's
            counted = s.attention_mask[:, -s.input_ids_BS.shape[1] :].bool()
            ours, theirs = hidden[counted], own[counted]
        if count := different(ours, theirs):
            where = _first_layer(check, before, member, mode, fused)
            self._differ(s.job, f"{count} of {ours.numel()} hidden values differ; {where}")
            return None
        return own if own.requires_grad else None

    def verify_gradients(
        self, job: int, own: Tensor, gradient: Tensor | None, before: Gradients
    ) -> None:
        """Hold what a job's gradients became against what its own model adds to them.

        Args:
            job: whose.
            own: the hidden states of its own model.
            gradient: of the job's loss, in the hidden states.
            before: the job's gradients before the pass went back.
        """
        trained = self.members[job].trained
        try:
            parameters = [trained[name] for name in before]
            added: Sequence[Tensor | None] = torch.autograd.grad(
                own, parameters, gradient, allow_unused=True
            )
        except Exception as error:
            if out_of_memory(error):
                return
            raise
        for (name, was), grad in reversed(list(zip(before.items(), added, strict=True))):
            if grad is None:
                continue
            expected = grad if was is None else was + grad
            if count := different(trained[name].grad, expected):
                text = f"{count} of {grad.numel()} gradients of {name} differ"
                self._differ(job, f"{text}, those of later layers do not")
                return

    def _differ(self, job: int, what: str) -> None:
        """Note that a pass was not the run alone, and let the job's passes be its own from here."""
        self.apart.add(job)
        self.differences.append(f"pass {self.passes}: {what}")
        log.error(
            "lockstep: the pass of a job is not the run alone (%s); the job shares no pass any"
            " more, and no job of its pack is proven equal",
            self.differences[-1],
        )


def different(ours: Tensor | None, theirs: Tensor) -> int:
    """Return how many numbers differ in a bit; zeros of either sign are one, NaN equals NaN."""
    if ours is None:
        return theirs.numel()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[ours.element_size()]
    one, other = (t.detach().contiguous().view(bits) for t in (ours, theirs))
    return int(((one != other) & ((ours != 0) | (theirs != 0))).sum())


def _first_layer(
    check: Check, before: list[Segment], member: Member, mode: Mode, fused: Any
) -> str:
    """Make a pass and the job's own again, and name the first layer whose outputs differ."""
    s = before[check.place]
    if any(one.past is not None for one in before):
        return "its layer is not known: a cache is not filled twice"
    (p,) = fused.passes([copy.copy(one) for one in before])
    with keeping_random():
        with _outputs(member.body) as theirs:
            member.alone(s, None, mode)
        with _outputs(fused.body) as ours:
            fused.forward(p)
    for name, own in theirs.items():
        if name in ours and ours[name].shape[:2] == (1, sum(p.sizes)):
            part = split(ours[name], p.sizes)[check.place]
            if part.numel() == own.numel() and different(part.reshape(own.shape), own):
                return f"the first layer is {name}"
    return "no layer differs when the pass is made again"


@contextmanager
def _outputs(body: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep what each layer puts out, in the order in which they end."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2:
            kept[name] = output.detach().clone()

    handles = [
        module.register_forward_hook(lambda _m, _x, output, name=name: keep(name, output))
        for name, module in body.named_modules()
        if name
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
