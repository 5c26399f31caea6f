"""A sweep's report while its jobs train."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

WRITER = "lora_exp.comparison.report"
EVERY_S = 60.0  # a report costs seconds of a processor, which training jobs need
RUNG_S = 5.0  # the same after a rung; the jobs that it ends do so together


class LiveReport:
    """The report of a sweep that still trains, written by a process of its own."""

    def __init__(self, folder: Path, name: str | None) -> None:
        """Write nothing yet.

        Args:
            folder: the sweep's.
            name: of the file in it; None: there is to be none.
        """
        self.folder, self.name = folder, name
        self._began = time.time()
        self._process: subprocess.Popen[bytes] | None = None

    def refresh(self, after_rung: bool = False) -> None:
        """Write it anew beside the training, after a rung or once a minute at most.

        No sweep fails if it cannot be written.
        """
        with suppress(OSError):
            self._refresh(RUNG_S if after_rung else EVERY_S)

    def _refresh(self, every: float) -> None:
        if self.name is None or (self._process is not None and self._process.poll() is None):
            return
        path = self.folder / self.name
        written = path.stat().st_mtime if path.is_file() else 0.0
        if time.time() - max(written, self._began) < every:
            return
        command = [sys.executable, "-m", WRITER, str(self.folder), self.name]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt of the sweep is not for it
        )

    def stop(self) -> None:
        """End the process, so that it cannot overwrite a later report."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
