"""A pack: jobs on one base whose unmodified trainers run in step with each other.

A trainer waits for the others at two points: where its model's body runs forward, and where
`backward` is called. `Pack` decides how many jobs train at once; `passes` computes their requests.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lora_exp.lockstep.eligibility import (
    adapter_obstacle,
    base_obstacle,
    described,
    fused_kinds,
    hooked,
    reads_padding,
)
from lora_exp.lockstep.hub import Hub, out_of_memory
from lora_exp.lockstep.passes import Passes
from lora_exp.lockstep.segment import CACHES, PassContext
from lora_exp.lockstep.state import ComputeState
from lora_exp.model.loading import Base, base_of
from lora_exp.model.memory import free_bytes, reset_peak
from lora_exp.model.placement import device
from lora_exp.model.requirement import loss_bytes, training_bytes
from lora_exp.model.sharing import sharing_copy

# tokens in one pass: more exceed a CPU's caches, and do not use a GPU better
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}
log = logging.getLogger("lora_exp")


@dataclass(eq=False)
class Shared:
    """A value that several jobs use; each of them holds this."""

    value: Any


class Pack:
    """Admits jobs to one base, and connects their trainers to the hub."""

    def __init__(
        self,
        mode: str,
        max_jobs: int | None,
        verify: float,
        base: Base | None = None,
        memory_share: float = 1.0,
    ) -> None:
        """Create an empty pack.

        Args:
            mode: `exact` or `bmm`, see `FusedLinear`.
            max_jobs: at once; None: as many as fit into memory, computed when the first job joins.
            verify: the share of passes that are repeated for one job alone, see `Verification`.
            base: if it is loaded already; None: the first job loads it.
            memory_share: of the free memory, which the pack may fill.
        """
        self.mode, self.max_jobs = mode, max_jobs
        # the first job measures the base for all; the others begin afterwards
        self.passes = Passes(mode, verify)
        self.hub = Hub(self.passes, 1, MAX_TOKENS[device().partition(":")[0]])
        self.least_tokens: dict[int, int] = {}  # of a job's passes in training
        self.job_bytes: dict[int, int] = {}  # estimated bytes of each job, without the base
        self.loss_bytes = 0  # bytes of one job's loss while it is computed
        self.free_bytes, self.admitting, self.memory_share = 0, False, memory_share
        self.obstacles: dict[int, str] = {}  # why a job shares no pass
        self.measured: dict[str, Any] = {}  # results before training, shared by equal jobs
        self.shared: WeakValueDictionary[str, Shared] = WeakValueDictionary()  # rows, tokens
        self._base = base

    def base(self, cfg: DictConfig) -> Base:
        """Return a copy of the base that shares its weights; the first job loads it."""
        if self._base is None:
            reset_peak()
            self._base = base_of(cfg)
        self.free_bytes = self.free_bytes or int(free_bytes() * self.memory_share)
        gc.freeze()  # nothing of this will be freed: garbage collection need not walk it
        return base_view(self._base)

    def join(self, job: int, trainer: Any) -> None:
        """Let a trainer share forward and backward passes, if its base and adapter allow it."""
        body = trainer.model.get_base_model().base_model
        assert self._base is not None
        obstacle = self._obstacle(body, trainer.args)
        if not obstacle:
            try:
                loss = loss_bytes(trainer)
                self.job_bytes[job] = training_bytes(trainer) - loss
                self.passes.add(job, body, self._base.model.base_model, reads_padding(trainer))
            except Exception as error:
                if out_of_memory(error):
                    raise
                obstacle = described(error)
                self.leave(job)
        if obstacle:
            self.obstacles[job] = obstacle
            log.info("lockstep: this job shares the base but no pass: %s", obstacle)
            return
        self.loss_bytes = max(self.loss_bytes, loss)
        if self.admitting:
            self.widen()
        gc.freeze()  # nor of the trainer: every job begins to train with a collection
        body.forward = self._shared_forward(job, body)
        backward = trainer.accelerator.backward

        def shared_backward(loss: Tensor, **options: Any) -> None:
            self.widen()
            try:
                backward(loss, **options)
                tapes = self.passes.tapes[job]
                if tapes:  # jobs of the same passes run backward together
                    batch_key = ("backward", *(id(tape.siblings) for tape in tapes))
                    self.hub.ask(job, batch_key, tapes[-1].size, 1, None)
            finally:
                self.passes.drop_tapes(job)

        trainer.accelerator.backward = shared_backward

    def _obstacle(self, body: Any, args: Any) -> str | None:
        """Return why a job cannot share a pass; None if it may."""
        assert self._base is not None
        if getattr(args, "activation_offloading", False):
            return "activation_offloading moves the activations that a pass keeps"
        base = self._base.model
        return base_obstacle(base) or adapter_obstacle(body, fused_kinds(base.base_model))

    def why_apart(self, job: int) -> str | None:
        """Return why a job shared no pass, or none while it trained; None if it shared them."""
        if job in self.obstacles:
            return self.obstacles[job]
        training, evaluation = (self._why_apart(job, part) for part in (True, False))
        if training and evaluation and training != evaluation:
            return f"in training: {training}; in evaluation: {evaluation}"
        if training and evaluation:
            return training
        part = "training" if training else "evaluation"
        return f"in {part}: {training or evaluation}" if training or evaluation else None

    def _why_apart(self, job: int, training: bool) -> str | None:
        why = self.passes.why_apart(training)
        if why or not training or job in self.passes.sharing or job not in self.least_tokens:
            return why
        least, most = self.least_tokens[job], self.hub.capacity
        others = [tokens for other, tokens in self.least_tokens.items() if other != job]
        if least + min(others, default=0) <= most:
            return None  # no other was there at the same time
        return f"its batches have {least:,} tokens or more, and a pass at most {most:,}"

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
        signature = inspect.signature(own_forward)
        layers = [m for m in body.modules() if hasattr(m, "gradient_checkpointing")]
        assert self._base is not None
        shared, hooks = self._base.model.base_model, None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal hooks
            arguments = dict(zip(signature.parameters, args, strict=False)) | kwargs
            if job in self.passes.verification.excluded or not is_plain_call(arguments):
                return own_forward(**arguments)
            grad = torch.is_grad_enabled()
            if grad and hooks is None:  # those of a trainer come when it begins
                hooks = hooked(body, shared)
                if hooks:
                    self.obstacles[job] = f"in training: {hooks}"
                    log.info("lockstep: this job computes its own passes: %s", hooks)
            if hooks:
                return own_forward(**arguments)
            checkpointing = grad and any(m.gradient_checkpointing and m.training for m in layers)
            context = PassContext(ComputeState.now(), body.training, checkpointing)
            assert self.passes.fused is not None
            size = self.passes.fused.tokens_of(job, arguments, context)
            if context.training:
                self.least_tokens[job] = min(size, self.least_tokens.get(job, size))
            output = self.hub.ask(job, context, size, 0, arguments)
            return own_forward(**arguments) if output is None else output

        return forward


def base_view(base: Base) -> Base:
    """Return a base with its own modules and tokenizer, over the same weights."""
    return replace(base, model=sharing_copy(base.model), tokenizer=copy.deepcopy(base.tokenizer))


def is_plain_call(arguments: dict[str, Any]) -> bool:
    """Return whether a call of the body can be a part of a pass."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    caches = [arguments[name] for name in CACHES if arguments.get(name) is not None]
    captured = [k for k, v in arguments.items() if k.startswith("output_") and v]
    return (
        isinstance(ids, Tensor)
        and arguments.get("inputs_embeds") is None
        and arguments.get("labels") is None
        and arguments.get("return_dict") is not False
        and set(captured) <= {"output_router_logits"}
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and all(map(_holds_keys, caches))
        and not torch.is_inference_mode_enabled()
    )


def _holds_keys(cache: Any) -> bool:
    """Return whether a cache holds keys and values only.

    Verified passes that continued from the states of recurrent layers have differed.
    """
    layers = getattr(cache, "layers", ())
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    return type(cache) is DynamicCache and not recurrent
