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
    """The states of torch's random generators."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Return the current states."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class ComputeState:
    """Gradient and autocast modes; requests must agree in them to be served as one."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> ComputeState:
        """Return the current modes."""
        device_types = ("cpu", "cuda")
        modes = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in device_types
        ]
        return cls(torch.is_grad_enabled(), tuple(modes))

    def restore(self) -> None:
        """Set the modes, and clear autocast's cache of cast weights, which are another job's."""
        torch.set_grad_enabled(self.grad)
        for device_type, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
        torch.clear_autocast_cache()


def set_autocast_depth(depth: int) -> int:
    """Set torch's count of nested autocast blocks, and return the old count.

    At depth 0 torch clears its cache of cast weights. While one job waits inside a block, the count
    would never reach 0, and another job would train with cast weights of an earlier step.
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

    Not the working directory and the environment: jobs that change them run alone, see `plan`.
    """

    compute_state: ComputeState
    depth: int
    python: Any
    numpy: Any
    singletons: tuple[dict[str, Any], ...]
    handlers: list[logging.Handler]
    level: int
    hydra: Any

    @classmethod
    def now(cls) -> ProcessState:
        """Return the running job's state, and set the modes of a fresh process."""
        root = logging.getLogger()
        state = cls(
            ComputeState.now(),
            set_autocast_depth(0),
            random.getstate(),
            np.random.get_state(),
            tuple(dict(singleton._shared_state) for singleton in SINGLETONS),
            root.handlers[:],
            root.level,
            HydraConfig.instance().cfg,
        )
        PLAIN.restore()
        return state

    def restore(self) -> None:
        """Restore the state of the job that runs next."""
        self.compute_state.restore()
        set_autocast_depth(self.depth)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for singleton, values in zip(SINGLETONS, self.singletons, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(values)
        root = logging.getLogger()
        root.handlers[:] = self.handlers
        if root.level != self.level:
            root.setLevel(self.level)
        HydraConfig.instance().cfg = self.hydra


PLAIN = ComputeState(True, (("cpu", False, torch.bfloat16), ("cuda", False, torch.float16)))
