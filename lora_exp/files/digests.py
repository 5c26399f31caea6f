"""Hashes of large files, kept in the cache: 16 GB of weights are not read again at each start."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from lora_exp.files.paths import results_dir
from lora_exp.files.whole import sha256, write_whole

SMALLEST = 2**26  # bytes; smaller files are hashed in a tenth of a second
SETTLED = 2 * 10**9  # ns; a later write might leave the times as they are


def digest(path: Path) -> str:
    """Return a file's SHA-256 as hex digits, from the cache if it is large and unchanged.

    Unchanged means the same size, inode, and times of the last change to its content and its
    inode. A disk that returns other bytes than were written is not noticed;
    `LORA_EXP_CACHE=` reads every byte.
    """
    folder = results_dir("hashes")
    if folder is None or path.stat().st_size < SMALLEST:
        return sha256(path)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    entry, state, now = folder / f"{name}.json", _state(path), time.time_ns()
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["sha256"])
    value = sha256(path)
    if _state(path) == state and now - max(state[:2]) > SETTLED:
        with suppress(OSError):  # on a full disk it is hashed again next time
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"path": str(path.resolve()), "state": state, "sha256": value})
            write_whole(entry, text + "\n")
    return value


def _state(path: Path) -> list[int]:
    """Return what changes with a file's content: times in ns, size, inode, device."""
    status = path.stat()
    return [
        status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev,
    ]  # fmt: skip
