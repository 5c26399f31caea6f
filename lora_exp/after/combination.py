"""How several LoRAs become one adapter, by peft's methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from transformers import set_seed

from lora_exp.adapter.mounting import mount_beside
from lora_exp.after.saved import Saved
from lora_exp.config.initialization import rewrites_base
from lora_exp.errors import AdapterError

METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
ALIASES = {"dare": "dare_linear"}  # of methods
# settings of an adapter that peft ignores when it combines several
NOT_COMBINED = (
    "use_dora", "modules_to_save", "trainable_token_indices", "bias", "lora_bias",
    "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "arrow_config",
    "alora_invocation_tokens", "monteclora_config", "velora_config",
)  # fmt: skip
SPARSE = ("ties", "dare", "magnitude")  # these keep a share of each adapter's weights


@dataclass(frozen=True)
class Combination:
    """How several adapters become one; unused for a single adapter."""

    method: str  # by peft's name
    weights: Sequence[float] | None  # of each adapter; None: 1 each
    density: float  # the share of each adapter's weights that ties, dare and magnitude_prune keep


def check_plain(saved: Saved) -> None:
    """Refuse an adapter of which peft would silently drop something when it combines several."""
    config = saved.adapter or {}
    dropped = [key for key in NOT_COMBINED if config.get(key) not in (None, False, "none", [], {})]
    rewriting = rewrites_base(config)
    if config["peft_type"] != "LORA" or dropped or rewriting:
        reason = rewriting if config["peft_type"] == "LORA" else config["peft_type"]
        reason = ", ".join(dropped) or reason
        raise AdapterError(f"{saved.folder}: only plain LoRAs are combined, this has {reason}")


def combine(
    model: Any, several: list[Saved], weights: list[float], method: str, density: float
) -> None:
    """Combine several adapters into one, and make it the active one.

    Args:
        model: a PeftModel with the first of them.
        several: all of them.
        weights: of each.
        method: by peft's name.
        density: the share of each adapter's weights that ties, dare and magnitude_prune keep.

    Raises:
        AdapterError: one does not fit, or the method cannot combine them.
    """
    names = ["default"]
    for i, saved in enumerate(several[1:], 1):
        mount_beside(model, str(saved.folder), f"adapter{i}")
        names.append(f"adapter{i}")
    set_seed(0)  # dare drops weights at random
    sparse = {"density": density} if method.startswith(SPARSE) else {}
    _place_by_name(model, names)
    model.peft_config["default"].use_rslora = False  # or peft would scale the combined adapter
    try:
        model.add_weighted_adapter(names, weights, "merged", combination_type=method, **sparse)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"{method} cannot combine these: {error}") from error
    model.set_adapter("merged")


def _place_by_name(model: Any, names: list[str]) -> None:
    """Name the modules of each adapter one by one.

    peft gives the combined adapter layers_to_transform and exclude_modules of the first, which
    would leave out modules of the others.
    """
    for name in names:
        config = model.peft_config[name]
        config.target_modules = {
            place
            for place, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and name in module.r
        }
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
