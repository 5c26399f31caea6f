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
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# libraries in Rust and C++ pass on only words: safetensors the system's, torch its own
WORDS = ("no space left", "quota exceeded", "file too large", "inline_container.cc")


def sha256(path: Path) -> str:
    """Return a file's hash."""
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
        CheckpointError: the disk refuses the write; a folder that was there before stays.
    """
    room = final.parent / f"{STAGE}{final.name}"
    _clear(room)
    made = room / final.name
    made.mkdir(parents=True)
    try:
        yield made
        for path in (*made.rglob("*"), made):
            _flush(path)
        if final.exists():
            final.rename(room / "old")
        made.rename(final)
        _flush(final.parent)
    except Exception as error:
        if (full := refusal(error, final)) is not None:
            raise full from error
        raise
    finally:
        _clear(room)


def clear(folder: Path) -> None:
    """Remove unfinished writes in a folder, and restore the folders that they were to replace."""
    for room in folder.glob(f"{STAGE}*"):
        if room.is_dir():
            _clear(room)


def _clear(room: Path) -> None:
    final = room.with_name(room.name.removeprefix(STAGE))
    if (room / "old").exists() and not final.exists():
        (room / "old").rename(final)
    shutil.rmtree(room, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written: a file's bytes, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(error: BaseException, path: Path) -> CheckpointError | None:
    """Return the error to raise if a disk refused a write (full, read-only, ...), or None."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause).lower()
        if getattr(cause, "errno", None) in REFUSALS or any(word in said for word in WORDS):
            place = Path(getattr(cause, "filename", None) or path)
            there = next(p for p in (place, *place.absolute().parents) if p.exists())
            free = shutil.disk_usage(there).free // 2**20
            text = f"{place} cannot be written: {cause} ({free} MiB are free)"
            return CheckpointError(
                f"{text}; make room, then do the same again (a run: resume=<its directory>)"
            )
        cause = cause.__cause__ or cause.__context__
    return None
