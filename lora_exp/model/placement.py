"""On which devices a base's weights lie: on one, or on as many as it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from lora_exp.errors import ConfigError
from lora_exp.parallel.world import world

DeviceMap = str | Mapping[str, str]
_requested: ContextVar[DeviceMap | None] = ContextVar("device_map", default=None)


@contextmanager
def placed(device_map: DeviceMap | None) -> Iterator[None]:
    """Load bases by a device map of accelerate, for the tools that come after training.

    Args:
        device_map: `auto` fills one device after the other; a dict names the device of each module;
            None: as outside, where nothing is requested on one device.
    """
    token = _requested.set(device_map or _requested.get())
    try:
        yield
    finally:
        _requested.reset(token)


def device() -> str:
    """Return the one device that a run, or this process of it, uses."""
    return f"cuda:{world.local_rank}" if torch.cuda.is_available() else "cpu"


def device_map(anyway: bool) -> dict[str, Any]:
    """Return `from_pretrained`'s argument for where weights go; empty: to the processor.

    Args:
        anyway: whether it must be there, as for weights that are quantised while they are read.
    """
    if requested := _requested.get():
        return {"device_map": requested if isinstance(requested, str) else dict(requested)}
    # processes in step share the weights out before these go to their devices
    if anyway or (torch.cuda.is_available() and not world.in_step):
        return {"device_map": {"": device()}}
    return {}


def check_fits(model: Any) -> None:
    """Refuse a base of which a part lies where nothing computes: adapters could not be merged.

    Raises:
        ConfigError: the devices are too small for it.
    """
    outside = {"disk", "cpu"} if torch.cuda.is_available() else {"disk"}
    places = getattr(model, "hf_device_map", {})
    left = [name for name, place in places.items() if str(place) in outside]
    if _requested.get() and left:
        raise ConfigError([("device_map", too_small(f"{len(left)} of {len(places)} parts"))])


def too_small(what: str) -> str:
    """Return the text of a fault for a part of a base that no device has room for."""
    cure = "leave it out"
    if torch.cuda.is_available():
        cure = "with CUDA_VISIBLE_DEVICES= the base lies in the processor's memory"
    return f"{what} of the base do not fit onto the devices; {cure}"
