"""What decides a result's bits beside its config and inputs: device, threads, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

VERSIONED = (
    "lora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "tokenizers",
    "safetensors", "datasets", "numpy", "greenlet",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result."""
    return {name: _version(name) for name in VERSIONED} | {"python": platform.python_version()}


@cache
def _version(name: str) -> str:
    return version(name)  # reads a file each time


def conditions(batch_invariant: bool = False) -> dict[str, Any]:
    """Return the device, torch's threads, settings of libraries, and versions, of this process.

    Args:
        batch_invariant: whether to add the versions of those kernels, if they are not in use now.
    """
    import torch

    from lora_exp.model import invariance
    from lora_exp.model.placement import device
    from lora_exp.model.processor import device_facts, kernel_settings

    has_kernels = batch_invariant or invariance.is_on()
    return {
        "device": device_facts(device()),
        "threads": torch.get_num_threads(),
        "settings": kernel_settings(),
        "versions": versions() | (invariance.versions() if has_kernels else {}),
    }


def condition_changes(record: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return how conditions differ from those of a run's record, one text for each.

    What the record does not have, since an earlier version wrote it, is not compared.

    Args:
        record: a run.json.
        current: from `conditions`.
    """
    texts = []
    for key, now in current.items():
        before = record.get(key)
        if not isinstance(now, Mapping) or not isinstance(before, Mapping):
            if before not in (None, now):
                texts.append(f"{key} {before} -> {now}")
            continue
        # variables may be absent; a package that was not recorded then is not known
        names = before.keys() | now.keys() if key == "settings" else before.keys() & now.keys()
        prefix = "" if key in ("versions", "settings") else f"{key} "
        texts += [
            f"{prefix}{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(names)
            if before.get(name) != now.get(name)
        ]
    return texts
