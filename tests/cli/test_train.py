"""The commands that train: `lora-exp run` is the runner, and a shell completes its overrides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.after.test_chat import run_cli


def test_lora_exp_run_is_the_runner(tmp_path: Path) -> None:
    done = run_cli("run", "--cfg", "job", "peft.r=4")
    assert done.returncode == 0, done.stderr
    assert "r: 4" in done.stdout
    wrong = run_cli("run", "peft.r=0", f"hydra.run.dir={tmp_path}/run")
    assert wrong.returncode == 1
    assert "peft.r: 0 is not a rank" in wrong.stderr


COMPLETING = "import sys; sys.argv[0] = 'lora-exp'\nfrom lora_exp.cli import main; main()"


def test_a_shell_completes_the_overrides_of_run() -> None:
    environment = {"_LORA_EXP_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for typed, expected in (("quant=n", "quant=nf4"), ("pef", "peft="), ("peft.lora_a", "alpha=")):
        command_line = {"COMP_WORDS": f"lora-exp run {typed}"}
        done = subprocess.run(
            [sys.executable, "-c", COMPLETING],
            env={**os.environ, **environment, **command_line},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expected in done.stdout, done.stderr
