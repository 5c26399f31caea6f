"""Which bases and adapters can share a pass, and why others cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2CLS

from lora_exp.lockstep.attention import PASTS, own_function
from lora_exp.lockstep.layers import LINEAR, layers_of
from lora_exp.lockstep.segment import CACHES
from lora_exp.lockstep.state import RandomState
from lora_exp.training.longest_first import is_shipped

ACTIVATIONS = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
CAPTURING = "transformers.utils.output_capturing"
# trainers whose losses and metrics mask padding: those of conf/algorithm
MASKING = frozenset(
    f"{name}Trainer" for name in ("SFT", "Reward", "DPO", "KTO", "GRPO", "RLOO", "PPO")
)
REQUIRES_GRAD = "make_inputs_require_grads"  # transformers' name of it


def base_obstacle(model: Any) -> str | None:
    """Return why jobs on this base cannot share a pass; None if they may."""
    if model.config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    body = model.base_model
    layers = layers_of(body)
    if not layers:
        return f"{type(body).__name__} has no layers of transformers' GradientCheckpointingLayer"
    if not any(isinstance(m, LINEAR) for layer in layers.values() for m in layer.modules()):
        return f"{type(next(iter(layers.values()))).__name__} has no linear layer"
    return None


def reads_padding(trainer: Any) -> bool:
    """Return whether a trainer may read hidden states of padding: unknown ones may."""
    return not is_shipped(trainer, MASKING)


def fused_kinds(body: Any) -> dict[str, str]:
    """Return the kinds of all modules of a body's layers that run once for all jobs, by name."""
    kinds: dict[str, str] = {}
    implementation = body.config._attn_implementation

    def add(path: str, parent: nn.Module) -> None:
        for leaf, module in parent.named_children():
            kind = kind_of(module, implementation)
            if kind != "other":
                kinds[f"{path}.{leaf}"] = kind
            if kind in ("attention", "container"):
                add(f"{path}.{leaf}", module)

    for name, layer in layers_of(body).items():
        add(name, layer)
    return kinds


def kind_of(module: nn.Module, implementation: str) -> str:
    """Return the kind of a module in a layer, which decides how it runs for several jobs.

    Args:
        module: the module.
        implementation: transformers' name of how the body computes attention.

    Returns:
        `linear`, `norm` and `activation` compute each row by itself and are measured; `attention`
        may run once for all jobs, but for the function that computes its heads; a `container` has
        only such modules; anything `other` runs for each job by itself.
    """
    if isinstance(module, LINEAR):
        return "linear"
    if isinstance(module, nn.Dropout) and module.p:
        return "other"
    has_linear = any(isinstance(m, LINEAR) for m in module.modules())
    if "Norm" in type(module).__name__ and not has_linear:
        return "norm"
    if isinstance(module, ACTIVATIONS):
        return "activation"
    parameters = inspect.signature(module.forward).parameters
    if "attention_mask" in parameters and hasattr(module, "is_causal"):
        # trainers change the dropout of a job's own modules only
        drops = any(isinstance(m, nn.Dropout) and m.p for m in module.modules())
        return "attention" if own_function(module, implementation) and not drops else "other"
    mixes = {"attention_mask", *PASTS, *CACHES} & set(parameters)
    own_tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if mixes or own_tensors or isinstance(module, nn.ModuleList):
        return "other"
    if not list(module.children()):  # code that is not known
        return "container" if isinstance(module, nn.Dropout | nn.Identity) else "other"
    kinds = {kind_of(child, implementation) for child in module.children()}
    is_dropout_only = not (kinds - {"container"})
    rowwise = kinds <= {"linear", "norm", "activation", "container"} and "activation" in kinds
    return "container" if rowwise or is_dropout_only else "other"


def adapter_obstacle(body: Any, fused: dict[str, str]) -> str | None:
    """Return why a body's adapter cannot share a pass; None if it can.

    Args:
        body: the job's, with its adapter.
        fused: see `fused_kinds`; elsewhere any adapter acts as it does alone.
    """
    for name, module in body.named_modules():
        if name not in fused or not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            return f"{name} is adapted by {type(module).__name__}"
        if not isinstance(module.get_base_layer(), LINEAR):
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
            # gradient checkpointing lets embeddings require a gradient: the job's own do; outputs
            # are captured in modules that run for each job by itself, or the proof fails
            harmless = getattr(hook, "__name__", "") == REQUIRES_GRAD or (
                getattr(hook, "__module__", "") == CAPTURING
            )
            if id(hook) not in known and not harmless:
                return f"{name} has the hook {getattr(hook, '__qualname__', hook)}"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (
        module._forward_pre_hooks, module._forward_hooks,
        module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    return [hook for hooks in kinds for hook in hooks.values()]


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state afterwards."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
