"""Which linear layers take part in what a model computes: measured, since architectures differ.

Some classes read a layer's weight themselves (state-space mixers), never call it (layers that share
their keys and values) or compute with it outside the gradient; an adapter on it would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_exp.errors import ConfigError
from lora_exp.model.precision import autocast, is_quantised

TOKENS = 4
_taking_part: dict[Any, frozenset[str]] = {}  # by base


def unused(model: Any, names: Iterable[str], base: str | None) -> set[str]:
    """Return which of a model's layers get no gradient in a small forward and backward.

    Args:
        model: the bare base; its mode and the random state do not change.
        names: of linear layers that each token passes, so none of routed experts.
        base: identifies its weights, for which this is measured once; None: unknown.

    Raises:
        ConfigError: the model computes with the weight of a quantised layer, as if it were floats.
    """
    key = (base, type(model), is_quantised(model))
    if base is None or key not in _taking_part:
        _taking_part[key] = frozenset(_measure(model))
    return set(names) - _taking_part[key]


def _measure(model: Any) -> set[str]:
    """Return the names of the linear layers whose output, one tensor, gets a gradient."""
    outputs: dict[str, Any] = {}
    running: list[str] = []  # modules whose forward has begun and not ended
    training = model.training
    model.eval()
    try:
        with _watched(model, outputs, running), torch.enable_grad(), autocast(model):
            _logits(model).square().mean().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, TypeError) as error:
        if not is_quantised(model) or not running:
            raise
        raise ConfigError([("quant.skip_modules", _advice(model, running[-1], error))]) from error
    finally:
        model.train(training)
    tensors = {name: out for name, out in outputs.items() if isinstance(out, Tensor)}
    return {name for name, out in tensors.items() if out.grad is not None}


def _logits(model: Any) -> Tensor:
    """Return the logits of some tokens, with a graph from the embeddings on."""
    vocab_size = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(vocab_size, (1, TOKENS), generator=generator).to(model.device)
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_1T
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


@contextmanager
def _watched(model: Any, outputs: dict[str, Any], running: list[str]) -> Iterator[None]:
    """Collect the outputs of linear layers, and the modules that run."""

    def begin(name: str) -> None:
        running.append(name)

    def end(name: str, module: nn.Module, output: Any) -> Any:
        running.pop()
        if isinstance(module, nn.Embedding):
            return output.requires_grad_()
        if isinstance(module, nn.Linear | Conv1D):
            outputs[name] = output
            if isinstance(output, Tensor) and output.requires_grad:
                output.retain_grad()
        return output

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: begin(name)),
            module.register_forward_hook(lambda m, _x, out, name=name: end(name, m, out)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _advice(model: Any, name: str, error: Exception) -> str:
    holder = model.get_submodule(name)
    layers = [key for key, module in holder.named_children() if isinstance(module, nn.Linear)]
    kind, reason = type(holder).__name__, str(error).splitlines()[0]
    return f"{kind} reads quantised weights itself ({reason}); give those of [{','.join(layers)}]"
