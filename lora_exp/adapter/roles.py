"""The roles of a model's layers: what each linear layer, or stack of experts, is there for.

A role is decided by what a module is part of, since names differ between architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_exp.model.experts import expert_modules, stacks
from lora_exp.model.mixture import expert_count
from lora_exp.model.text_part import text_modules

ROLES = ("all_linear", "attention", "mlp", "experts", "qv", "norm")
# separate query and value projections, those of latent attention (MLA), and fused ones
QUERY_VALUE = re.compile(
    r"q|v|[qv]_proj|q_[ab]_proj|kv_b_proj|query|value|(query|value)_proj|w[qv]|[qv]_lin"
    r"|c_attn|query_key_value|qkv(_proj)?|Wqkv|W_pack|att_proj|in_proj_qkvz?"
)
FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)  # in a class's name
MIXER = re.compile(r"mamba|mixer|conv|rwkv|recurrent|ssm", re.IGNORECASE)  # neither of the two


def modules_of(role: str, model: Any) -> set[str]:
    """Return the names of a role's modules, all of them in the language model.

    Args:
        role: one of `ROLES`.
        model: the base.
    """
    if role == "norm":
        named = text_modules(model).items()
        return {name for name, module in named if "norm" in type(module).__name__.lower()}
    routers, experts, members = set(_routers(model)), experts_of(model), set()
    for name, module in text_modules(model).items():
        in_a_layer = any(part.isdigit() for part in name.split(".")[:-1])
        if not isinstance(module, nn.Linear | Conv1D) or not in_a_layer or name in routers:
            continue  # output and classification heads are outside the layers
        part = "experts" if f"{name}.".startswith(experts) else _part(name, model)
        last = name.rpartition(".")[2]
        query_value = part == "attention" and QUERY_VALUE.fullmatch(last) is not None
        if role in (part, "all_linear" if part != "experts" else "", "qv" if query_value else ""):
            members.add(name)
    return members


def stacks_of(role: str, model: Any) -> dict[str, tuple[int, ...]]:
    """Return a role's weights that are no module's: stacks of a layer's experts, [E, ...].

    Args:
        role: one of `ROLES`.
        model: the base.

    Returns:
        The shapes by the parameters' names.
    """
    return stacks(model) if role == "experts" else {}


def experts_of(model: Any) -> tuple[str, ...]:
    """Return how the names of the modules of routed experts begin: few tokens pass each expert."""
    return tuple(f"{name}." for name in expert_modules(model))


def _part(name: str, model: Any) -> str:
    """Return whether a layer belongs to attention, to the feed-forward block, or to neither."""
    parents = name.rpartition(".")[0]
    holder = type(model.get_submodule(parents)).__name__
    if any(word in f"{parents} {holder}".lower() for word in ("attn", "attention")):
        return "attention"
    return "other" if MIXER.search(holder) and not FEED_FORWARD.search(holder) else "mlp"


def _routers(model: Any) -> Iterator[str]:
    """Yield the linear layers that weigh the experts, and shared ones: E outputs, or one."""
    count = expert_count(model.config)
    blocks = {name.rpartition(".")[0] for name in expert_modules(model)}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.Linear) and within and module.out_features in (1, count):
            yield name
