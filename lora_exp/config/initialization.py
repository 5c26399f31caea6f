"""How LoRA's weights are initialised (`init_lora_weights`): requirements, effects on the base.

The names are those of peft 0.21.2, `tuners/lora/layer.py` and `variants.py`; a test compares each
with peft. Needs no torch: the launcher plans with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# peft computes the adapter's first weights from the base and subtracts them there, so that both
# together equal the base; loftq also leaves the weights rounded
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# these need data, or a second base, that a run does not provide
NEEDS_PREPARATION = ("corda", "eva", "loftq", "lora_ga")
NEEDS_FLOATS = ("pissa", "olora", "mica", "orthogonal")  # of those that a run supports


def initialization(adapter: Mapping[str, Any]) -> str:
    """Return the name of an adapter's initialisation; `pissa_niter_4` is `pissa`, too.

    Args:
        adapter: a config's `peft` section, or an adapter_config.json.

    Returns:
        peft's name; empty: that of LoRA's paper, or of a method other than LoRA.
    """
    name = adapter.get("init_lora_weights")
    return name.lower().partition("_niter")[0] if isinstance(name, str) else ""


def rewrites_base(adapter: Mapping[str, Any]) -> str | None:
    """Return the name of what rewrites the base's weights before training; None: nothing does.

    Args:
        adapter: as for `initialization`.
    """
    if adapter.get("kasa_config") is not None:  # it drops the base's smallest singular values
        return "kasa"
    name = initialization(adapter)
    return name if name in REWRITES_BASE else None


def saved_as_plain_lora(adapter: Mapping[str, Any]) -> bool:
    """Return whether a run saves the difference to the original base as LoRA of twice the rank.

    Args:
        adapter: as for `initialization`.
    """
    name = initialization(adapter)
    return name in REWRITES_BASE and name not in NEEDS_PREPARATION
