"""Trackio's database, read with its own storage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK

pytest.importorskip("trackio", reason="the extra trackio is not installed")


def test_the_database_of_trackio_holds_metrics_config_and_samples(tmp_path: Path) -> None:
    words = [*QUICK, "tracking=[trackio]", "train.logging_steps=1", "sweep_name=ranks", "peft.r=4"]
    code = (  # a process of its own: Trackio reads its folder's name when it is imported
        f"import os; os.environ['TRACKIO_DIR'] = {str(tmp_path / 'db')!r}\n"
        "from lora_exp import compose, run\n"
        f"run(compose(*{words!r}), {str(tmp_path / 'run')!r})\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(name,) = S.get_runs('lora-exp')\n"
        "logs = S.get_logs('lora-exp', name)\n"
        "print([l['step'] for l in logs if 'train/loss' in l])\n"
        "config = S.get_run_config('lora-exp', name)\n"
        "print(config['peft']['r'], config['run']['place'], config['_Group'])\n"
        "print(any('samples' in l for l in logs), any('before/loss' in l for l in logs))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["[1, 2, 3]", "4 alone ranks", "True True"]
    assert "* " not in done.stdout
