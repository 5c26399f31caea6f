"""How LoRA's weights begin (`init_lora_weights`), and what that needs of the base or changes in it.

As read in peft 0.21.2, `tuners/lora/layer.py` and `variants.py`; a test holds each against peft.
Needs no torch: the launcher plans with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# peft takes from the base's weights what the adapter begins with, so that both together are the
# base; loftq also leaves the weights rounded
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# data, or a second base, that a run does not make
NEEDS_PREPARATION = ("corda", "eva", "loftq", "lora_ga")
NEEDS_FLOATS = ("pissa", "olora", "mica", "orthogonal")  # of those that a run can make


def initialization(adapter: Mapping[str, Any]) -> str:
    """Return the name of how an adapter's weights begin, `pissa` of `pissa_niter_4` too.

    Args:
        adapter: a config's `peft` section, or an adapter_config.json.

    Returns:
        peft's name; empty: as LoRA's paper begins, or as another method does.
    """
    chosen = adapter.get("init_lora_weights")
    return chosen.lower().partition("_niter")[0] if isinstance(chosen, str) else ""


def rewrites_base(adapter: Mapping[str, Any]) -> str | None:
    """Name what of an adapter rewrites the base's weights before training; None: nothing does.

    Args:
        adapter: as of `initialization`.
    """
    if adapter.get("kasa_config") is not None:  # it drops the base's smallest singular values
        return "kasa"
    name = initialization(adapter)
    return name if name in REWRITES_BASE else None


def saved_as_plain_lora(adapter: Mapping[str, Any]) -> bool:
    """Say whether a run saves the difference to the original base, in plain LoRA of twice the rank.

    Args:
        adapter: as of `initialization`.
    """
    name = initialization(adapter)
    return name in REWRITES_BASE and name not in NEEDS_PREPARATION
