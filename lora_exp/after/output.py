"""Whether a command may write to a path: a folder, or a file."""

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
    """Refuse to overwrite what is there.

    With `force` a model or an adapter may be overwritten, unless it is one of the sources.

    Raises:
        SavedError: the path is taken, or no folder can be made there.
    """
    if not path.exists():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise SavedError(f"{above} is no folder that can be written to")
        return
    if not force:
        raise SavedError(f"{path} exists; --force replaces it")
    here = path.resolve()
    source_paths = [Path(source).expanduser().resolve() for source in sources]
    if any(here == source or here in source.parents for source in source_paths):
        raise SavedError(f"{path} is also the input; give another path")
    entries = list(path.iterdir()) if path.is_dir() else [path]
    ours = all(entry.is_file() and entry.suffix in SUFFIXES for entry in entries)
    if entries and not (ours and any(entry.suffix == ".safetensors" for entry in entries)):
        raise SavedError(f"{path} does not hold only a model or adapter; give another path")


@contextmanager
def output_folder(path: Path, force: bool, sources: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`; one process at a time writes it.

    Raises:
        SavedError: another process writes it, or `check_free` now refuses it.
        CheckpointError: the disk refuses the write.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    file = cache_dir() / "locks" / name  # a lock file beside the folder would stay there
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(file)
    except Timeout as error:
        text = f"{path} is being written by another process; wait for it, or give another path"
        raise SavedError(text) from error
    try:
        check_free(path, force, sources)
        with whole(path) as staging:
            yield staging
    finally:
        lock.release()


def check_file(path: Path, force: bool, source: str | None = None) -> None:
    """Refuse to write a file that exists or cannot be made; its source is never overwritten.

    Raises:
        SavedError: the path is taken, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise SavedError(f"{path} is a folder; give a file")
    if path.exists() and not force:
        raise SavedError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SavedError(f"{path.parent} is no folder that can be written to")
    if source and path.resolve() in (file.resolve() for file in files(source)):
        raise SavedError(f"{path} is also the input; give another path")
