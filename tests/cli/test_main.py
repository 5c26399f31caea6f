"""The command line: quick help, the version, errors as one clear line."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from tests.after.test_chat import run_cli


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.argv = ['lora-exp', *{arguments}]\nfrom lora_exp.cli import main\n"
    script += "try: main()\nfinally: assert 'torch' not in sys.modules"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_imports_no_torch() -> None:
    started = time.perf_counter()
    done = without_torch("--help")
    assert time.perf_counter() - started < 5  # docs/benchmarks.md has the measured time
    assert done.returncode == 0, done.stderr
    commands = "run inspect save merge check chat generate evaluate serve push sync doctor estimate"
    commands += " models compare"
    for command in commands.split():
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect"], 2, "Missing argument 'PATH'"),
        (["inspect", "nowhere", "--jsn"], 2, "--jsn"),
        (["check", "nowhere", "--prompts", "x"], 2, "need it"),
        (["estimate", "demo"], 1, "demo: cannot be read; give key=value"),
        (["merge", "a", "-o", "b", "--dtype", "int3"], 2, "'int3' is not one of"),
        (["merge", "a", "-o", "b", "--weights", "x"], 2, "numbers with commas between"),
        (["instpect", "a"], 2, "inspect"),
        (["peft.r=8"], 2, "lora-exp run peft.r=8 trains"),
    ],
)
def test_an_error_is_one_clear_line(arguments: list[str], code: int, message: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == code
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_the_version_is_printed() -> None:
    assert run_cli("--version").stdout.strip() == version("lora-exp")
