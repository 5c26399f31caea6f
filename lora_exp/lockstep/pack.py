"""A pack: jobs on one base whose unmodified trainers run in step with each other.

A trainer waits for the others at two points: where its model's body runs forward, and where
`backward` is called. `Pack` decides how many jobs train at once; `passes` computes their requests.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_exp.lockstep.eligibility import adapter_obstacle, base_obstacle, hooked
from lora_exp.lockstep.hub import Hub
from lora_exp.lockstep.passes import Passes
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import ComputeState
from lora_exp.model.loading import Base, base_of, device, sharing_copy
from lora_exp.model.memory import free_bytes, reset_peak
from lora_exp.model.requirement import loss_bytes, training_bytes

# tokens in one pass: more exceed a CPU's caches, and do not use a GPU better
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}
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
        """Create an empty pack.

        Args:
            mode: `exact` or `bmm`, see `FusedLinear`.
            max_jobs: at once; None: as many as fit into memory, computed when the first job joins.
            verify: the share of passes that are repeated for one job alone, see `Verification`.
            base: if it is loaded already; None: the first job loads it.
        """
        self.mode, self.max_jobs = mode, max_jobs
        # the first job measures the base for all; the others begin afterwards
        self.passes = Passes(mode, verify)
        self.hub = Hub(self.passes, 1, MAX_TOKENS[device().partition(":")[0]])
        self.job_bytes: dict[int, int] = {}  # estimated bytes of each job, without the base
        self.loss_bytes = 0  # bytes of one job's loss while it is computed
        self.free_bytes, self.admitting = 0, False
        self.measured: dict[str, Any] = {}  # results before training, shared by equal jobs
        self._base = base

    def base(self, cfg: DictConfig) -> Base:
        """Return a copy of the base that shares its weights; the first job loads it."""
        if self._base is None:
            reset_peak()
            self._base = base_of(cfg)
        self.free_bytes = self.free_bytes or free_bytes()
        gc.freeze()  # nothing of this will be freed: garbage collection need not walk it
        return base_view(self._base)

    def join(self, job: int, trainer: Any) -> None:
        """Let a trainer share forward and backward passes, if its base and adapter allow it."""
        model = trainer.model.get_base_model()
        body = model.base_model
        assert self._base is not None
        obstacle = base_obstacle(self._base.model) or adapter_obstacle(model)
        if getattr(trainer.args, "activation_offloading", False):
            obstacle = "activation_offloading moves the activations that a pass keeps"
        if obstacle:
            log.info("lockstep: this job shares the base but no pass: %s", obstacle)
            return
        loss = loss_bytes(trainer)
        self.job_bytes[job] = training_bytes(trainer) - loss
        self.loss_bytes = max(self.loss_bytes, loss)
        if self.admitting:
            self.widen()
        self.passes.add(job, body, self._base.model.base_model)
        body.forward = self._shared_forward(job, body)
        backward = trainer.accelerator.backward

        def shared_backward(loss: Tensor, **options: Any) -> None:
            self.widen()
            try:
                backward(loss, **options)
                tapes = self.passes.tapes[job]
                if tapes:  # jobs of the same passes run backward together
                    batch_key = ("backward", *(id(tape.siblings) for tape in tapes))
                    self.hub.ask(job, batch_key, tapes[-1].segment.tokens, 1, None)
            finally:
                self.passes.drop_tapes(job)

        trainer.accelerator.backward = shared_backward

    def widen(self) -> None:
        """Admit as many jobs as memory has room for, if all were as large as the largest so far."""
        self.admitting = True
        available = 0.8 * self.free_bytes - self.loss_bytes
        fitting = int(available / max(self.job_bytes.values(), default=self.free_bytes))
        fitting -= self.passes.verification.fraction > 0  # verification holds one job's rows twice
        self.hub.width = self.max_jobs or max(1, fitting)

    def leave(self, job: int) -> None:
        """Remove a job."""
        self.job_bytes.pop(job, None)
        self.passes.remove(job)

    def _shared_forward(self, job: int, body: Any) -> Callable[..., Any]:
        own_forward = body.forward
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
            arguments = {
                "input_ids": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids, "past_key_values": past_key_values,
                "use_cache": use_cache, **rest,
            }  # fmt: skip
            if job in self.passes.verification.excluded or not is_plain_call(arguments):
                return own_forward(**arguments)
            grad = torch.is_grad_enabled()
            if grad and hooks is None:  # those of a trainer come when it begins
                hooks = hooked(body, shared)
                if hooks:
                    log.info("lockstep: this job computes its own passes: %s", hooks)
            if hooks:
                return own_forward(**arguments)
            checkpointing = grad and any(m.gradient_checkpointing and m.training for m in layers)
            context = PassContext(ComputeState.now(), body.training, checkpointing)
            request = {
                "input_ids_BS": input_ids, "attention_mask": attention_mask,
                "position_ids": position_ids, "past": past_key_values,
            }  # fmt: skip
            hidden = self.hub.ask(job, context, arguments["input_ids"].numel(), 0, request)
            if hidden is None:
                return own_forward(**arguments)
            return BaseModelOutputWithPast(hidden, past_key_values)

        return forward


def base_view(base: Base) -> Base:
    """Return a base with its own modules and tokenizer, over the same weights."""
    return replace(base, model=sharing_copy(base.model), tokenizer=copy.deepcopy(base.tokenizer))


def is_plain_call(arguments: dict[str, Any]) -> bool:
    """Return whether a call of the body needs only hidden states (and its cache filled)."""
    arguments = {k: v for k, v in arguments.items() if v is not None and v is not False}
    mask, past = arguments.get("attention_mask"), arguments.get("past_key_values")
    accepted = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache",
             "return_dict", "num_items_in_batch"}  # fmt: skip
    return (
        set(arguments) <= accepted
        and "input_ids" in arguments
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and (past is None or type(past) is DynamicCache)
        and not (arguments.get("use_cache") and past is None)
        and not torch.is_inference_mode_enabled()
    )
