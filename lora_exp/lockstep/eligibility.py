"""Which bases and adapters can share a pass, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_exp.lockstep.state import RandomState

REQUIRES_GRAD = "make_inputs_require_grads"  # transformers' name of it


def base_obstacle(model: Any) -> str | None:
    """Return why jobs on this base cannot share a pass; None if they can."""
    body, config = model.base_model, model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or not body._supports_attention_backend:
        return f"its attention is {config._attn_implementation}, not sdpa"
    if layer_types != {"full_attention"} or getattr(config, "sliding_window", None):
        return "its attention slides"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ({rope}) depends on the longest row"
    if getattr(config, "attention_dropout", 0) or any(
        isinstance(m, nn.Dropout) and m.p for m in body.modules()
    ):
        return "it has dropout of its own"
    for module in body.modules():
        supported = isinstance(module, nn.Linear | nn.Embedding) or "Norm" in type(module).__name__
        if not supported and list(module.parameters(recurse=False)):
            return f"{type(module).__name__} has weights that are no linear layer's"
    return None


def adapter_obstacle(model: Any) -> str | None:
    """Return why a model's adapter cannot share a pass; None if it can."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            return f"{name} is adapted by {type(module).__name__}"
        if isinstance(module, LoraLayer):
            if not isinstance(module.get_base_layer(), nn.Linear):
                return f"{name} is no linear layer"
            if module.lora_variant:
                return f"{name} has {type(next(iter(module.lora_variant.values()))).__name__}"
    return None


def hooked(body: Any, shared: Any) -> str:
    """Name a module of a job's body with a hook, which a shared pass would leave out; else "".

    Args:
        body: the job's.
        shared: the pack's base, whose own hooks act in both.
    """
    known = {id(hook) for module in shared.modules() for hook in _hooks(module)}
    for name, module in body.named_modules():
        for hook in _hooks(module):
            # gradient checkpointing lets embeddings require a gradient; a pass sees to that
            if id(hook) not in known and getattr(hook, "__name__", "") != REQUIRES_GRAD:
                return f"{name} has the hook {getattr(hook, '__qualname__', hook)}"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (
        module._forward_pre_hooks, module._forward_hooks,
        module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    return [hook for hooks in kinds for hook in hooks.values()]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state afterwards."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
