"""Torch's process-wide switches during a run: deterministic kernels on a GPU, TF32 only if asked.

A CPU computes the same bits each time anyway; there nothing is set. What trainers set in the whole
process (`full_determinism`, `tf32`) ends with the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.utils.import_utils import enable_tf32

from lora_exp.errors import ConfigError
from lora_exp.model import invariance

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# transformers' `full_determinism` sets them
VARIABLES = (
    WORKSPACE, "CUDA_LAUNCH_BLOCKING", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip
REFUSAL = " does not have a deterministic implementation"  # torch's words


@dataclass(frozen=True)
class Switches:
    """The values of all switches."""

    algorithms: tuple[bool, bool]  # whether only deterministic ones; only warned about
    fills_memory: bool  # whether new tensors are filled, which finds use of what is not set
    convolutions: tuple[bool, bool]  # cuDNN's: deterministic; measured and chosen
    precisions: tuple[str, ...]  # of float32 products: all, GPU's, cuDNN's
    variables: tuple[str | None, ...]

    running: ClassVar[int] = 0  # runs that use the process, the jobs of a pack all at once
    before: ClassVar[Switches]  # of the process, while a run has it

    @classmethod
    def now(cls) -> Switches:
        """Return the current values."""
        return cls(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            tuple(backend.fp32_precision for backend in _backends()),
            tuple(os.environ.get(name) for name in VARIABLES),
        )

    def restore(self) -> None:
        """Set these values."""
        torch.use_deterministic_algorithms(self.algorithms[0], warn_only=self.algorithms[1])
        torch.utils.deterministic.fill_uninitialized_memory = self.fills_memory  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.convolutions
        enable_tf32.cache_clear()  # else the next run that asks for it does not get it
        # the first is what the others inherit, until they are set themselves
        for backend, precision in zip(_backends(), self.precisions, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
        for name, value in zip(VARIABLES, self.variables, strict=True):
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _backends() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return torch.backends, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]


@contextmanager
def switched(deterministic: bool, batch_invariant: bool = False) -> Iterator[None]:
    """Let a run have the process's switches, and restore them when no run is left.

    All jobs of a pack agree in both.

    Args:
        deterministic: whether a GPU may only use kernels that add in the same order each time.
        batch_invariant: whether the bits of a product may not depend on its number of rows.

    Raises:
        ConfigError: the device has no kernels for that, or another run has the process without.
    """
    if Switches.running and batch_invariant != invariance.is_on():
        text = "another run in this process has another value, and the process has one; "
        raise ConfigError([(invariance.KEY, f"{text}run one after the other")])
    if Switches.running == 0:
        Switches.before = Switches.now()
    Switches.running += 1
    try:
        if Switches.running == 1:
            if batch_invariant:
                invariance.start()
            if torch.cuda.is_available():
                set_for_gpu(deterministic)
        yield
    finally:
        Switches.running -= 1
        if Switches.running == 0:
            invariance.stop()
            Switches.before.restore()


def set_for_gpu(deterministic: bool) -> None:
    """Set the switches as a run on a GPU has them."""
    torch.backends.cudnn.allow_tf32 = False  # torch allows it in convolutions, but not in products
    if not deterministic:
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS reads it at its first product
    # attention has a deterministic backward only where others are refused, not warned about
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def forked_random_state() -> AbstractContextManager[None]:
    """Restore torch's random state afterwards: the CPU's, and that of the GPU that is used."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(gpus)


@contextmanager
def explained() -> Iterator[None]:
    """Name the key, where torch refuses an operation that has no deterministic kernel.

    Raises:
        ConfigError: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        name, refused, _ = str(error).partition(REFUSAL)
        if not refused:
            raise
        text = f"{name} has no kernel on this device that gives the same bits each time"
        raise ConfigError([("deterministic", f"{text}; give deterministic=false")]) from error
