"""Which linear layers take part in what a model computes: measured, since architectures differ.

Some classes read a layer's weight themselves (state-space mixers), never call it (layers that share
their keys and values) or compute with it outside the gradient; an adapter on it would do nothing.
Where a layer's product is in groups, it is narrower than an adapter's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_exp.errors import ConfigError
from lora_exp.model.determinism import forked_random_state
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
        ConfigError: the model computes with the weight of a quantised layer, as if it were floats;
            or it cannot compute.
    """
    key = (base, type(model), is_quantised(model))
    if base is None or key not in _taking_part:
        _taking_part[key] = frozenset(_measure(model))
    return set(names) - _taking_part[key]


def _measure(model: Any) -> set[str]:
    """Return the names of the linear layers whose output, one tensor, gets a gradient.

    It must get one in evaluation, and in training too, where some classes compute otherwise: but
    not where a layer is skipped at random with all that surrounds it.
    """
    training = model.training
    try:
        with forked_random_state():
            evaluated, _ = _reached(model.eval())
            trained, ran = _reached(model.train())
    finally:
        model.train(training)
    # some blocks run by methods of their own, and only what is in them is seen to run
    blocks = ran | {name.rpartition(".")[0] for name in ran}
    return {name for name in evaluated if name in trained or name.rpartition(".")[0] not in blocks}


def _reached(model: Any) -> tuple[set[str], set[str]]:
    """Return the names of the linear layers that get a gradient, and of all modules that ran."""
    outputs: dict[str, list[Tensor]] = {}  # of linear layers, as wide as their weights; else []
    try:
        with _watched(model, outputs), torch.enable_grad(), autocast(model):
            _logits(model).square().mean().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ConfigError([_fault(model, error)]) from error
    reached = {name for name, all_ in outputs.items() if any(x.grad is not None for x in all_)}
    return reached, {*outputs}


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
def _watched(model: Any, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the outputs of linear layers, and the names of all modules that run."""

    def end(name: str, module: nn.Module, output: Any) -> Any:
        passed = outputs.setdefault(name, [])
        if isinstance(module, nn.Embedding):  # a copy, since some classes scale it in place
            return output.requires_grad_().clone()
        if isinstance(module, nn.Linear | Conv1D) and isinstance(output, Tensor):
            width = module.nf if isinstance(module, Conv1D) else module.out_features
            passed += [output] * (output.shape[-1] == width)
            if output.requires_grad:
                output.retain_grad()
        return output

    handles = [
        module.register_forward_hook(lambda m, _x, out, name=name: end(name, m, out))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fault(model: Any, error: Exception) -> tuple[str, str]:
    """Return the key and text of a base that cannot compute, by the module where it fails."""
    reason = str(error).partition("\n")[0]
    callers = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
    *_, holder = (caller for caller in callers if isinstance(caller, nn.Module))
    layers = [key for key, module in holder.named_children() if isinstance(module, nn.Linear)]
    if is_quantised(model) and layers:
        text = f"{type(holder).__name__} reads quantised weights itself ({reason})"
        return "quant.skip_modules", f"{text}; give those of [{','.join(layers)}]"
    text = f"{type(model).__name__} cannot compute {TOKENS} tokens with their gradients"
    return "model.path", f"{text}: {reason}"
