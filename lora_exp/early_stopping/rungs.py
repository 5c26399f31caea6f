"""Rungs: the steps of a training at which jobs are measured and compared. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ROUNDING = 1e-9  # 1/9 * 3 * 3 is not exactly 1


def rung_steps(shares: Sequence[float], steps: int) -> list[int]:
    """Return the step of each rung, without those at the last step or at that of an earlier one.

    Args:
        shares: of the training steps, ascending.
        steps: of the whole training.
    """
    numbers = [max(1, math.ceil(share * steps - ROUNDING)) for share in shares]
    return [step for step in dict.fromkeys(numbers) if step < steps]


def reported_value(report: Mapping[str, Any]) -> float | None:
    """Return the value of a report in run.json, where NaN is null; None: it was not measured."""
    if report.get("measured") is False:
        return None
    return math.nan if report["value"] is None else float(report["value"])
