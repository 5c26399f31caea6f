"""Importing transformers, peft and trl in less time.

docs/decisions/0017-start-up.md has the reasons and the numbers.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import import_module
from typing import Any

MODELS = ("transformers.modeling_utils", "peft")
TRAINERS = ("datasets", "trl.trainer.base_trainer")


def load(training: bool = True, freeze: bool = False) -> None:
    """Import the libraries that load models, unless they are imported already.

    Args:
        training: whether to import those that train them, too.
        freeze: whether garbage collections leave out all that exists now; for a process of our own.
    """
    names = [name for name in (*MODELS, *TRAINERS[: 2 * training]) if name not in sys.modules]
    if not names:
        return
    with _without_collections():
        with _compiled_when_called():
            import_module("bitsandbytes")
        for name in names:
            import_module(name)
    if freeze:
        gc.freeze()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let no garbage collection walk the hundred thousands of objects that imports create."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Let `torch.compile` compile at a function's first call: it loads torch's compiler.

    bitsandbytes decorates its fallbacks with it, which most runs never call.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Callable[..., Any]:
        if function is None:  # @torch.compile(...)
            return partial(compile_later, **options)
        compiled: Any = cache(lambda: compile_now(function, **options))

        @wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            return compiled()(*values, **named)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
