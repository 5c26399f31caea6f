"""A command in a forked process does what it does in one that Python starts anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import Process, python

SCRIPT = """
import atexit, os, sys
print(sys.argv, sys.path[0], os.getcwd(), os.environ, sys.stdin.read(), __name__, __file__)
atexit.register(print, "after the script")
sys.exit({code})
"""


@pytest.mark.parametrize(("code", "returncode"), [("", 0), ("3", 3), ("'a mistake'", 1)])
def test_arguments_folder_environment_streams_and_exit_code_are_those_of_python(
    tmp_path: Path, code: str, returncode: int
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(code=code))
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "ONLY": "here"}
    for arguments in (["-m", "script", "a=b"], [str(tmp_path / "script.py"), "--flag"]):
        forked = python(*arguments, cwd=tmp_path, env=environment, stdin="typed")
        anew = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, input="typed",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (forked.stdout, forked.stderr) == (anew.stdout, anew.stderr)
        assert forked.returncode == anew.returncode == returncode


def test_an_uncaught_error_and_a_signal_end_a_command(tmp_path: Path) -> None:
    failed = python("-c", "1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    sleeping = Process("-c", "import time; time.sleep(60)", cwd=tmp_path, new_session=True)
    assert sleeping.poll() is None
    os.killpg(sleeping.pid, signal.SIGTERM)
    assert sleeping.wait(timeout=60) == -signal.SIGTERM
    assert sleeping.communicate() == ["", ""]


def test_commands_run_side_by_side() -> None:
    first, second = (Process("-c", "import sys; print(sys.stdin.read())", stdin=w) for w in "ab")
    assert [second.communicate()[0], first.communicate()[0]] == ["b\n", "a\n"]
