"""What a cell may need at most, known before training: trainable parameters and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_exp.errors import ConfigError
from lora_exp.record.console import size as size_text

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PARAMETERS, BYTES = "parameters", "bytes"


@dataclass(frozen=True)
class Size:
    """What the job of a cell needs, by `lora-exp estimate`."""

    parameters: int  # that are trained
    bytes: int  # of memory, at most at a time

    def __str__(self) -> str:
        return f"{self.parameters:,} trainable parameters, about {size_text(self.bytes)}"


@dataclass(frozen=True)
class Limits:
    """The most that a cell may need; None: any number."""

    parameters: int | None = None
    bytes: int | None = None

    def admit(self, size: Size | None) -> bool:
        """Return whether a cell meets the limits; one whose job will be refused (None) does."""
        if size is None:
            return True
        pairs = ((size.parameters, self.parameters), (size.bytes, self.bytes))
        return all(limit is None or number <= limit for number, limit in pairs)

    @property
    def asked(self) -> dict[str, int]:
        """The limits that there are, by their names in `hydra.sweeper`."""
        limits = {f"max_{PARAMETERS}": self.parameters, f"max_{BYTES}": self.bytes}
        return {key: limit for key, limit in limits.items() if limit is not None}

    def __str__(self) -> str:
        """Return the limits as they are written on the command line."""
        return ", ".join(f"{key}={limit}" for key, limit in self.asked.items())


def read_limits(section: Mapping[str, Any]) -> Limits:
    """Return the limits in `hydra.sweeper`.

    Raises:
        ConfigError: one is no number above 0 (all are listed).
    """
    values = {key: section[f"max_{key}"] for key in (PARAMETERS, BYTES)}
    units = {PARAMETERS: {"": 1}, BYTES: UNITS}
    limits = {key: None if v is None else _whole(str(v), units[key]) for key, v in values.items()}
    hints = {PARAMETERS: "a number of trainable parameters, like 200000",
             BYTES: "bytes, like 8GiB"}  # fmt: skip
    faults = [
        (f"hydra.sweeper.max_{key}", f"{values[key]!r} is no limit; give {hints[key]}")
        for key, limit in limits.items()
        if limit is not None and limit < 1
    ]
    if faults:
        raise ConfigError(faults)
    return Limits(**limits)


def _whole(text: str, units: Mapping[str, int]) -> int:
    """Return a number with its unit as a whole number; 0: it is none."""
    parts = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", text)
    if parts is None or parts[2].upper() not in units:
        return 0
    try:
        number = float(parts[1])
    except ValueError:
        return 0
    return int(number * units[parts[2].upper()]) if math.isfinite(number) else 0
