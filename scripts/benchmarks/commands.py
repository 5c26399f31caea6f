"""Commands that are timed, and what they leave behind."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUIET = ["tracking=none", "samples.rows=0", "train.eval_strategy=no", "train.save_strategy=no"]


def timed(*command: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command in the repository and return its wall time in seconds."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return time.perf_counter() - started, done


def run(folder: Path, *overrides: str) -> tuple[float, dict]:
    """Train into a folder and return the wall time and run.json."""
    seconds, done = timed(sys.executable, "run.py", f"hydra.run.dir={folder}", *overrides)
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, json.loads((folder / "run.json").read_text())


def sweep(folder: Path, *arguments: str) -> tuple[float, dict[str, dict]]:
    """Run a sweep into a folder and return its wall time and jobs."""
    seconds, done = timed(
        sys.executable, "run.py", "-m", *arguments, f"hydra.sweep.dir={folder}", "tracking=none"
    )
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, {job["job"]: job for job in json.loads((folder / "summary.json").read_text())}


def in_processes(
    folder: Path, cells: list[list[str]], settings: list[str], every: int
) -> tuple[float, float]:
    """Train jobs in processes of their own; return the seconds with one thread, and with all.

    With all threads one of `every` jobs is trained, and counted so many times. One thread is what
    later commands have, too.
    """
    alone = threaded = 0.0
    for i, cell in enumerate(cells):
        arguments = [*cell, *settings, "tracking=none"]
        if i % every == 1:
            os.environ.pop("OMP_NUM_THREADS", None)
            threaded += every * run(folder / f"threaded{i}", *arguments)[0]
        os.environ["OMP_NUM_THREADS"] = "1"
        alone += run(folder / f"alone{i}", *arguments)[0]
    return alone, threaded


def weights(folder: Path) -> dict[str, str]:
    """Return the hash of each job's adapter."""
    files = sorted(folder.glob("*/adapter/adapter_model.safetensors"))
    return {f.parts[-3]: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def spread(values: list[float]) -> str:
    """Write median (least to most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
