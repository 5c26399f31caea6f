"""Copies of runs, to damage them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def copy_run(run: Path, to: Path) -> Path:
    """Copy a run."""
    shutil.copytree(run, to)
    return to


def copy_with_weights(run: Path, to: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Copy a run; return the copy, the file of its adapter's weights, and the weights."""
    file = copy_run(run, to) / "adapter" / "adapter_model.safetensors"
    return to, file, load_file(file)
