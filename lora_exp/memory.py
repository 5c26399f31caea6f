"""The most memory that a run held: the GPU's where there is one, else the process's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Forget the peaks of the runs before in this process, as far as the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM: proc(5)


def peak_bytes() -> int:
    """Return the peak since `reset_peak`, in bytes; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) * 1024 if found else 0
