"""One process at a time in a directory; the lock goes with its process, however that ends."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from lora_exp.errors import ConfigError

if sys.platform != "win32":  # which has no flock, and goes without
    import fcntl


class Lock:
    """A directory held until `release`, or until the process is gone (flock(2))."""

    def __init__(self, directory: Path, key: str) -> None:
        """Take the directory, which is made where there is none.

        Args:
            directory: a run's or a sweep's.
            key: of the config, to name in the error.

        Raises:
            ConfigError: another process, or another run of this one, holds it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / ".lock").open("a+", encoding="utf-8")
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            text = f"{directory} is in use by {holder}; wait for it, or take another directory"
            raise ConfigError([(key, text)]) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Give the directory back; also for processes forked since, which share the lock."""
        if sys.platform != "win32" and not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def __del__(self) -> None:
        """Give it back with the last that knows of it."""
        if hasattr(self, "_file"):
            self.release()
