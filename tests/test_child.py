"""A process ends with the one that has started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tests.conftest import ROOT

PARENT = """
import os, sys, time
from lora_exp.child import end_with_parent
parent = os.getpid()
if (child := os.fork()) == 0:
    end_with_parent(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_a_child_is_asked_to_stop_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        start = time.monotonic()
        assert parent.stdout.read() == ""  # its end: the child has closed its copy, too
        assert time.monotonic() - start < 30


def test_a_child_of_another_parent_does_not_begin() -> None:
    code = "from lora_exp.child import end_with_parent; end_with_parent(1234567)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 130
