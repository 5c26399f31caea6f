"""Write files so that they are complete or absent, even after a crash; and hash them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.errors import CheckpointError

STAGE = ".staged-"
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# errors of libraries in Rust and C++ have no errno, only a message: safetensors passes on the
# system's, torch writes its own
MESSAGES = ("no space left", "quota exceeded", "file too large", "inline_container.cc")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: after a crash it has the old text or the new."""
    staged = path.with_name(f"{STAGE}{os.getpid()}-{path.name}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to its final path when all of it is on the disk.

    Raises:
        CheckpointError: the disk refuses the write; an older folder at the final path stays.
    """
    stage = final.parent / f"{STAGE}{final.name}"
    _undo(stage)
    written = stage / final.name
    written.mkdir(parents=True)
    try:
        yield written
        for path in (*written.rglob("*"), written):
            _flush(path)
        if final.exists():
            final.rename(stage / "old")
        written.rename(final)
        _flush(final.parent)
    except Exception as error:
        if (disk_error := refusal(error, final)) is not None:
            raise disk_error from error
        raise
    finally:
        _undo(stage)


def clear(folder: Path) -> None:
    """Remove unfinished writes in a folder, and restore the folders that they had moved away."""
    for stage in folder.glob(f"{STAGE}*"):
        if stage.is_dir():
            _undo(stage)


def _undo(stage: Path) -> None:
    """Remove a temporary folder; put back the old folder where the new one has not replaced it."""
    final = stage.with_name(stage.name.removeprefix(STAGE))
    if (stage / "old").exists() and not final.exists():
        (stage / "old").rename(final)
    shutil.rmtree(stage, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(error: BaseException, path: Path) -> CheckpointError | None:
    """Return the error to raise if a disk refused a write (full, read-only, ...), else None."""
    cause: BaseException | None = error
    while cause is not None:
        message = str(cause).lower()
        if getattr(cause, "errno", None) in ERRNOS or any(text in message for text in MESSAGES):
            target = Path(getattr(cause, "filename", None) or path)
            existing = next(p for p in (target, *target.absolute().parents) if p.exists())
            free = shutil.disk_usage(existing).free // 2**20
            text = f"{target} cannot be written: {cause} ({free} MiB are free)"
            return CheckpointError(
                f"{text}; make room, then do the same again (a run: resume=<its directory>)"
            )
        cause = cause.__cause__ or cause.__context__
    return None
