"""One process at a time in a directory; the system frees the lock when its process ends."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from lora_exp.errors import ConfigError

log = logging.getLogger("lora_exp")


def hold(file: Path, wait: bool = False) -> FileLock:
    """Lock a file, if its file system has locks, until the lock is released or garbage-collected.

    A forked process does not hold it: a data loader may outlive its run.

    Raises:
        Timeout: another process, or another lock of this one, holds it, and `wait` is false.
    """
    # filelock's fallback where there is no flock(2), a soft lock, would outlive a killed process
    lock = FileLock(file, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s): do not use it twice at once", file.parent, error)
    return lock


def in_use(directory: Path) -> bool:
    """Say whether a process holds a directory now."""
    file = directory / ".lock"
    if not file.is_file():
        return False
    try:
        hold(file).release()
    except Timeout:
        return True
    return False


class Lock:
    """A lock on a directory, held until `release` or until the process ends."""

    def __init__(self, directory: Path, key: str) -> None:
        """Lock the directory; create it if it does not exist.

        Args:
            directory: a run's or a sweep's.
            key: the config key that the error names.

        Raises:
            ConfigError: another process, or another run of this one, holds it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / ".lock"
        try:
            self._lock = hold(file)
        except Timeout as error:
            holder = file.read_text(encoding="utf-8", errors="replace").strip()
            text = f"{directory} is in use by {holder or 'another process'}"
            text += "; wait for it, or take another directory"
            raise ConfigError([(key, text)]) from error
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def release(self) -> None:
        """Release the directory."""
        self._lock.release()
