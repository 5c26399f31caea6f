"""Peak and free memory: the GPU's where there is one, else the process's."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")


def reset_peak() -> None:
    """Reset the peak, which earlier runs in this process may have raised, where the system can.

    What they have freed is given back first: the system counts it as the process's.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        give_back()
        CLEAR.write_text("5")  # resets VmHWM: proc(5)


def peak_bytes() -> int:
    """Return the peak since `reset_peak`, in bytes; 0 where the system does not report it."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    match = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(match[1]) * 1024 if match else 0


def keep_freed() -> None:
    """Keep freed memory for the next pass, where the C library can (glibc, mallopt(3)).

    By default every large block goes back to the system, and comes again page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(-3, 2**30):  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back() -> None:
    """Give freed memory back to the system, where the C library can (glibc, malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    torch.cuda.empty_cache()


def free_bytes() -> int:
    """Return how much memory is still available: the GPU's where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    match = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    return int(match[1]) * 1024 if match else 2**33
