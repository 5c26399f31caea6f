"""Whether a command may write where it was told to: a folder, or a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from lora_exp.data.reading import files
from lora_exp.errors import SavedError
from lora_exp.files.lock import hold
from lora_exp.files.paths import cache_dir
from lora_exp.files.whole import whole

SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model", ".yaml")


def check_free(path: Path, force: bool, sources: Sequence[str | Path] = ()) -> None:
    """Refuse to write over what is there; with `force` only over a model or adapter, no source.

    Raises:
        SavedError: the path is taken, or can be no folder.
    """
    if not path.exists():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise SavedError(f"{above} is no folder that can be written to")
        return
    if not force:
        raise SavedError(f"{path} exists; --force replaces it")
    here = path.resolve()
    read = [Path(source).expanduser().resolve() for source in sources]
    if any(here == source or here in source.parents for source in read):
        raise SavedError(f"{path} is what is read; name another place")
    there = list(path.iterdir()) if path.is_dir() else [path]
    ours = all(entry.is_file() and entry.suffix in SUFFIXES for entry in there)
    if there and not (ours and any(entry.suffix == ".safetensors" for entry in there)):
        raise SavedError(f"{path} holds something else than a model or adapter; name another place")


@contextmanager
def written(path: Path, force: bool, sources: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`; one process at a time writes it.

    Raises:
        SavedError: another process writes it, or `check_free` refuses it by now.
        CheckpointError: the disk refuses the write.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    file = cache_dir() / "locks" / name  # beside the folder it would stay behind
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(file)
    except Timeout as error:
        text = f"{path} is being written by another process; wait for it, or name another place"
        raise SavedError(text) from error
    try:
        check_free(path, force, sources)
        with whole(path) as made:
            yield made
    finally:
        lock.release()


def check_file(path: Path, force: bool, source: str | None = None) -> None:
    """Refuse to write a file over another, or where there can be none; never over its source.

    Raises:
        SavedError: the path is taken, or its folder is missing or closed.
    """
    if path.is_dir():
        raise SavedError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise SavedError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SavedError(f"{path.parent} is no folder that can be written to")
    if source and path.resolve() in (file.resolve() for file in files(source)):
        raise SavedError(f"{path} is what is read; name another place")
