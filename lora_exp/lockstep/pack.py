"""A pack: jobs on one base, their trainers unmodified, in step with each other.

A trainer meets the others at two points: where its model's body runs, and where `backward` is
called. How many jobs sit at once is decided here; what they ask for is made by `passes`.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_exp.lockstep.eligibility import foreign, hooked, unfusable
from lora_exp.lockstep.hub import Hub
from lora_exp.lockstep.passes import Passes
from lora_exp.lockstep.segment import Mode
from lora_exp.lockstep.state import Precision
from lora_exp.model.loading import Base, base_of, device, sharing_copy
from lora_exp.model.memory import free_bytes, reset_peak
from lora_exp.model.requirement import loss_bytes, training_bytes

# tokens in one pass: more of them leave a CPU's caches, and keep a GPU no busier
ROOM = {"cpu": 2048, "cuda": 16384}
log = logging.getLogger("lora_exp")


class Pack:
    """Admits jobs to one base, and connects their trainers to the hub."""

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
            max_jobs: at once; None: as many as memory holds, known when the first job joins.
            verify: the share of passes that are made again for one job alone, see `Verification`.
            base: loaded already; None: by the first job.
        """
        self.mode, self.max_jobs = mode, max_jobs
        # the first job measures the base for all; the others begin when it has
        self.passes = Passes(mode, verify)
        self.hub = Hub(self.passes, 1, ROOM[device().partition(":")[0]])
        self.held: dict[int, int] = {}  # bytes that each job takes beside the base, estimated
        self.loss = 0  # bytes that one job's loss takes while it is computed
        self.free, self.wide = 0, False
        self.measured: dict[str, Any] = {}  # what jobs need not measure again
        self._base = base

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
        loss = loss_bytes(trainer)
        self.held[job], self.loss = training_bytes(trainer) - loss, max(self.loss, loss)
        if self.wide:
            self.widen()
        self.passes.take(job, body, self._base.model.base_model)
        body.forward = self._meeting(job, body)
        backward = trainer.accelerator.backward

        def meet(loss: Tensor, **options: Any) -> None:
            self.widen()
            try:
                backward(loss, **options)
                tapes = self.passes.tapes[job]
                if tapes:  # those of the same passes go back together
                    kind = ("backward", *(id(tape.made) for tape in tapes))
                    self.hub.ask(job, kind, tapes[-1].segment.tokens, 1, None)
            finally:
                self.passes.drop(job)

        trainer.accelerator.backward = meet

    def widen(self) -> None:
        """Let as many jobs begin as may: by memory, as many as the largest would fit so far."""
        self.wide = True
        room = 0.8 * self.free - self.loss
        fitting = int(room / max(self.held.values(), default=self.free))
        fitting -= self.passes.verification.share > 0  # which holds one job's rows twice
        self.hub.width = self.max_jobs or max(1, fitting)

    def leave(self, job: int) -> None:
        """Forget a job."""
        self.held.pop(job, None)
        self.passes.leave(job)

    def _meeting(self, job: int, body: Any) -> Callable[..., Any]:
        own = body.forward
        layers = [m for m in body.modules() if hasattr(m, "gradient_checkpointing")]
        assert self._base is not None
        shared, hooks = self._base.model.base_model, None

        def forward(
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
            **rest: Any,
        ) -> Any:
            nonlocal hooks
            given = {
                "input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids, "past_key_values": past_key_values,
                "use_cache": use_cache, **rest,
            }  # fmt: skip
            if job in self.passes.verification.apart or not simple(given):
                return own(**given)
            grad = torch.is_grad_enabled()
            if grad and hooks is None:  # those of a trainer come when it begins
                hooks = hooked(body, shared)
                if hooks:
                    log.info("lockstep: this job computes its own passes: %s", hooks)
            if hooks:
                return own(**given)
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


def share(base: Base) -> Base:
    """Return a base of its own tree and tokenizer over the same weights."""
    return Base(
        sharing_copy(base.model),
        copy.deepcopy(base.tokenizer),
        base.path,
        base.revision,
        base.warning,
    )


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
