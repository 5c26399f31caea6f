"""SIGTERM and Ctrl-C: a run saves at the end of the step and stops; it can be resumed.

Signals go to the process, so there is one `stop` object per process. It knows nothing of trainers;
they check it at every step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_exp.errors import Interrupted

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a later try goes on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed
MESSAGE = "saving at the next step, then stopping; Ctrl-C again stops at once"


class Stop:
    """Whether a signal asked this process to stop, and whether a step must end first."""

    def __init__(self) -> None:
        self.asked = False
        self.training = 0  # trainers that stop at the end of a step
        self.forward: Callable[[], None] | None = None  # signals the process that trains
        self.silent = False
        self.agree: Callable[[bool], bool] = bool  # whether a process of the run was asked
        self._interrupts, self._process = 0, os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        """Handle a signal.

        Raises:
            Interrupted: nothing trains here, so it stops at once.
            KeyboardInterrupt: at the second Ctrl-C.
        """
        if os.getpid() != self._process:  # a data loader's process: its parent decides when it ends
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._interrupts += number == signal.SIGINT
        first, self.asked = not self.asked, True
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not first:
            return
        if self.forward is None and not self.training:
            raise Interrupted
        if not self.silent:
            os.write(2, f"\n{MESSAGE}\n".encode())  # print is not for signal handlers
        if self.forward is not None:
            self.forward()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside this context; only the main thread can, others do nothing."""
        if threading.current_thread() is not threading.main_thread() or self._is_installed():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
        self.asked, self._interrupts, self._process = False, 0, os.getpid()
        try:
            for number in handlers:
                signal.signal(number, self)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.asked = False

    def inherited(self) -> None:
        """Reset in a forked worker; its parent process prints the messages."""
        self.asked, self.training, self.forward, self.silent = False, 0, None, True
        self._interrupts, self._process = 0, os.getpid()

    def _is_installed(self) -> bool:
        return signal.getsignal(signal.SIGTERM) is self

    def agreed(self) -> bool:
        """Return whether a signal has asked this process to stop, or another one of its run."""
        return self.agree(self.asked)

    def check(self) -> None:
        """Stop here if a signal has asked for it.

        Raises:
            Interrupted: a signal has asked for it.
        """
        if self.agreed():
            raise Interrupted

    @contextmanager
    def until_a_step_ends(self) -> Iterator[None]:
        """Train inside this context; a signal then takes effect at the end of a step."""
        self.check()
        self.training += 1
        try:
            yield
        finally:
            self.training -= 1


stop = Stop()
