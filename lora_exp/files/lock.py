"""One process at a time in a directory; the lock goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from lora_exp.errors import ConfigError

log = logging.getLogger("lora_exp")


class Lock:
    """A directory held until `release`, or until the process is gone (flock(2))."""

    held: ClassVar[WeakSet[Lock]] = WeakSet()

    def __init__(self, directory: Path, key: str) -> None:
        """Take the directory, which is made where there is none.

        Args:
            directory: a run's or a sweep's.
            key: of the config, to name in the error.

        Raises:
            ConfigError: another process, or another run of this one, holds it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        self.held.add(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._file, 500).decode(errors="replace").strip()
            self.release()
            text = f"{directory} is in use by {holder or 'another process'}"
            text += "; wait for it, or take another directory"
            raise ConfigError([(key, text)]) from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): do not use it twice at once", directory, error)
        os.truncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Give the directory back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.held.discard(self)

    def __del__(self) -> None:
        """Give it back with the last that knows of it."""
        if hasattr(self, "_file"):
            self.release()


def _forked() -> None:
    """Let go of the parent's locks: a loader that outlives it is not to hold them."""
    for lock in list(Lock.held):
        lock.release()


os.register_at_fork(after_in_child=_forked)
