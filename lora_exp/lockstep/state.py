"""Process-wide state, saved and restored when the jobs of a pack switch."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from hydra.core.hydra_config import HydraConfig

# accelerate's singletons: one job's accumulation would skip another's optimizer step
SINGLETONS = (PartialState, AcceleratorState, GradientState)


@dataclass(frozen=True)
class RandomState:
    """Where torch's random streams stand."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Note where they stand."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class Precision:
    """The modes that decide how torch computes; two requests must agree in them to be one."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> Precision:
        """Note the modes."""
        kinds = ("cpu", "cuda")
        modes = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        return cls(torch.is_grad_enabled(), tuple(modes))

    def restore(self) -> None:
        """Set the modes; casts of weights that autocast remembers are another's, and go."""
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.clear_autocast_cache()


def nest(depth: int) -> int:
    """Set how deep in autocast blocks torch believes to be, and return how deep it was.

    At depth 0 it forgets its casts of weights: beside a job that waits inside a block, another's
    would never be forgotten, and it would go on with weights of an earlier step.
    """
    before = torch.autocast_increment_nesting() - 1
    for _ in range(before + 1):
        torch.autocast_decrement_nesting()
    for _ in range(depth):
        torch.autocast_increment_nesting()
    return int(before)


@dataclass(frozen=True)
class ProcessState:
    """Everything process-wide that a run reads or changes while it trains.

    Not the working directory and the environment: the planner lets jobs that change them run alone.
    """

    precision: Precision
    depth: int
    python: Any
    numpy: Any
    singletons: tuple[dict[str, Any], ...]
    handlers: list[logging.Handler]
    level: int
    hydra: Any

    @classmethod
    def now(cls) -> ProcessState:
        """Note the running job's state, and leave the modes as a fresh process has them."""
        root = logging.getLogger()
        state = cls(
            Precision.now(),
            nest(0),
            random.getstate(),
            np.random.get_state(),
            tuple(dict(kind._shared_state) for kind in SINGLETONS),
            root.handlers[:],
            root.level,
            HydraConfig.instance().cfg,
        )
        PLAIN.restore()
        return state

    def restore(self) -> None:
        """Give the job that goes on its state back."""
        self.precision.restore()
        nest(self.depth)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for kind, values in zip(SINGLETONS, self.singletons, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(values)
        root = logging.getLogger()
        root.handlers[:] = self.handlers
        if root.level != self.level:
            root.setLevel(self.level)
        HydraConfig.instance().cfg = self.hydra


PLAIN = Precision(True, (("cpu", False, torch.bfloat16), ("cuda", False, torch.float16)))
