"""Python commands, each in a process that is forked from one that has imported torch already.

A command of ours costs 7 s of processor time when Python starts anew, 6 of them for imports; so
one process (tests/forking.py) imports once and forks for each command. Arguments, folder,
environment, streams, signals, process group and exit code are the command's own, and it runs the
same code as `python ARGUMENTS`. Tests of imports, of what libraries read from the environment at
import, or of a terminal start Python themselves.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent


class Process:
    """A running command, used like `subprocess.Popen`; its output is kept in files."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        new_session: bool = False,
    ) -> None:
        self.arguments = arguments
        self.returncode: int | None = None
        new_file = partial(tempfile.TemporaryFile, "w+")
        self._outputs = [file or new_file() for file in (stdout, stderr)]
        status, report = os.pipe()
        self._status = os.fdopen(status)
        with new_file() as typed, os.fdopen(report, "w") as write_end:
            typed.write(stdin)
            typed.seek(0)
            request = [arguments, str(cwd), dict(os.environ if env is None else env), new_session]
            streams = [file.fileno() for file in (typed, *self._outputs, write_end)]
            socket.send_fds(_forking(), [json.dumps(request).encode()], streams)
        self.pid = int(self._status.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; minus the number of the signal that ended the command, if any."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
            with self._status:
                self.returncode = int(self._status.readline())
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> list[str]:
        """Wait, and return what was written to stdout and stderr."""
        self.wait(timeout)
        texts = []
        for file in self._outputs:
            with file:
                file.seek(0)
                texts.append(file.read())
        return texts

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = Process(*arguments, **settings)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.send_signal(signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.wait(), output, errors)


@cache
def _forking() -> socket.socket:
    """Start the process that forks; it ends with this one."""
    requests, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.forking"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=other_end, stdout=subprocess.DEVNULL)
    other_end.close()
    atexit.register(lambda: (requests.close(), process.wait()))
    return requests
