"""Programs that answer as Slurm's do."""

from __future__ import annotations

from pathlib import Path

import pytest


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of programs, the first in PATH; tests may replace some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "log").mkdir()
    program(folder, "srun", "exit 1")
    program(folder, "sbatch", "echo Submitted batch job 7")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder
