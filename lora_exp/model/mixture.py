"""Mixtures of experts: settings of their routers that trainers read and leave in a config."""

from __future__ import annotations

from typing import Any


def without_router_logits(model: Any) -> None:
    """Let a model return router logits only where a call asks for them.

    TRL's trainers ask for them, and SFT also switches them on in the config: each generation would
    then compute the load-balancing loss, from one token and the mask of all.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def name_experts(model: Any) -> None:
    """Set `num_experts`, by which TRL computes the load-balancing loss: not every config has it.

    A dense model of a mixture's class, as the small Granite 4 and Doge, has no routers to balance.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_local_experts", None)
    if count is not None and getattr(config, "num_experts", None) is None:
        config.num_experts = count
    if hasattr(config, "router_aux_loss_coef") and not has_routers(model):
        config.router_aux_loss_coef = 0.0


def has_routers(model: Any) -> bool:
    """Return whether a model has modules whose output transformers collects as router logits."""
    if expert_count(model.config) is None:
        return False
    collected = set()
    for module in model.modules():
        recorders = getattr(module, "can_record_outputs", {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            kind = getattr(recorder, "target_class", recorder)  # a class, or its name
            collected.add(getattr(kind, "__name__", kind))
    return not collected or any(type(m).__name__ in collected for m in model.modules())


def expert_count(config: Any) -> int | None:
    """Return how many routed experts a layer of a model has; None: it has none."""
    config = config.get_text_config()
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            if count := getattr(holder, name, None):
                return max(count) if isinstance(count, list) else int(count)  # one for each layer
    return None
