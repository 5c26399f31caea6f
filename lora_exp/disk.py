"""A disk that takes no more, told from other errors."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from lora_exp.errors import CheckpointError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# libraries in Rust and C++ pass on only words: safetensors the system's, torch its own
WORDS = ("no space left", "quota exceeded", "file too large", "inline_container.cc")


def refusal(error: BaseException, path: Path) -> CheckpointError | None:
    """Return what to tell of a disk that refused to write at a path, or None: it did not."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause).lower()
        if getattr(cause, "errno", None) in REFUSALS or any(word in said for word in WORDS):
            free = shutil.disk_usage(path.parent).free // 2**20
            text = f"{path} cannot be written: {cause} ({free} MiB are free)"
            return CheckpointError(f"{text}; make room, then resume=<run directory> goes on")
        cause = cause.__cause__ or cause.__context__
    return None
