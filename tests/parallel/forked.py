"""The runner's command line, whose processes are forked from this one: without imports of torch."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lora_exp import __main__ as runner
from lora_exp import rank
from lora_exp.parallel import launch
from lora_exp.training.interruption import SIGNALS


class Forked:
    """What `subprocess.Popen` would start as `python -m lora_exp.rank FOLDER`."""

    def __init__(self, command: list[str], env: Mapping[str, str], stdout: Any, **_: Any) -> None:
        assert command[1:4] == ["-P", "-m", "lora_exp.rank"]
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(command[-1], env, silent=stdout is not None)

    def _be(self, folder: str, env: Mapping[str, str], silent: bool) -> None:
        try:
            os.setsid()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # as in a process that begins
            os.environ.clear()
            os.environ.update(env)
            if silent:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            sys.argv = ["rank", folder]
            rank.main()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(9)

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> None:
        """Wait until the process has ended."""
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


if __name__ == "__main__":
    launch.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=Forked, DEVNULL=launch.subprocess.DEVNULL
    )
    runner.main()
