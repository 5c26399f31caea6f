"""A process that another one of ours has started ends with it."""

from __future__ import annotations

import ctypes
import os
import signal


def end_with_parent(parent: int) -> None:
    """Have the system send SIGTERM to this process when its parent ends (prctl(2))."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit(130)
