"""Rungs: the steps of a training at which jobs are measured and compared. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9  # 1/9 * 3 * 3 is not exactly 1


def rung_steps(shares: Sequence[float], steps: int) -> list[int]:
    """Return the step of each rung; rungs that would be at the last step are left out.

    Args:
        shares: of the training steps, ascending.
        steps: of the whole training.
    """
    numbers = [max(1, math.ceil(share * steps - ROUNDING)) for share in shares]
    return [step for step in numbers if step < steps]
