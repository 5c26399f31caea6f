"""One measuring: its bases, its folder, its time, and the commands that it runs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.commands import ROOT


class Shape(NamedTuple):
    """A base with random weights."""

    channels: int
    inner: int
    layers: int
    heads: int
    heads_kv: int
    vocabulary: int
    saved_as: str = "bf16"  # or nf4, so that it is not quantised at each start


BASES = {  # of Qwen3 0.6B (and four of its layers), Qwen3 1.7B and Llama 3 8B
    "small": Shape(1024, 3072, 4, 16, 8, 151936),
    "0.6B": Shape(1024, 3072, 28, 16, 8, 151936),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 151936),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, "nf4"),
}
TINY = {"small": Shape(64, 128, 2, 2, 1, 512), "8B": Shape(64, 128, 2, 2, 1, 512, "nf4")}


class Failed(Exception):
    """A measurement has no result; the text says why."""


def python(*arguments: str, timeout: float, env: dict[str, str]) -> Any:
    """Run Python in the repository; what it started ends with it."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@dataclass
class Bench:
    """One measuring: its bases, its folder, and until when its part may take."""

    level: str
    device: str
    scratch: Path
    words: tuple[str, ...] = ()  # cases are measured whose part or name has one of them
    until: float = 0.0  # of time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real measuring."""
        return self.device != "cpu"

    @property
    def bases(self) -> dict[str, Shape]:
        """Return the bases that are needed, by name."""
        if not self.on_gpu:
            return TINY
        return {n: s for n, s in BASES.items() if self.level == "full" or n != "1.7B"}

    def command(self, *arguments: str) -> str:
        """Run Python and return what it printed.

        Raises:
            Failed: it has failed, or the time of the part is over.
        """
        left = self.until - time.monotonic()
        hidden = {} if self.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        env = os.environ | hidden | {"HF_HUB_OFFLINE": "1", "TTY_COMPATIBLE": "0"}
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(arguments, left)
            done = python(*arguments, timeout=left, env=env)
        except subprocess.TimeoutExpired:
            raise Failed("not measured: the time of its part is over") from None
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
            raise Failed(f"**failed**: {lines[-1][:200].replace('|', '/')}")
        return str(done.stdout)

    def sweep(self, name: str, *overrides: str, alone: bool = False) -> list[dict[str, Any]]:
        """Train jobs, in a pack or one by one, and return the records in their order."""
        folder = self.scratch / name
        launcher = ["hydra/launcher=basic"] if alone else []
        words = ["run.py", "-m", *overrides, *launcher, f"hydra.sweep.dir={folder}"]
        self.command(*words, "tracking=none", "report=null")
        folders = sorted(folder.glob("*/run.json"), key=lambda path: int(path.parent.name))
        return [json.loads(path.read_text()) for path in folders]

    def base(self, name: str) -> list[str]:
        """Return the overrides that choose a base."""
        if not (self.scratch / name / "config.json").is_file():
            raise Failed(f"not measured: the base {name} was not made")
        return ["model=local", f"model.path={self.scratch / name}", "model.dtype=bfloat16"]

    def weights(self, name: str) -> list[str]:
        """Return the hashes of a sweep's adapters, in the order of their folders."""
        files = sorted((self.scratch / name).glob("**/adapter/adapter_model.safetensors"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    def compared(self, one: str, other: str) -> str:
        """Return whether the adapters of two sweeps have equal bytes, in words."""
        a, b = self.weights(one), self.weights(other)
        same = sum(x == y for x, y in zip(a, b, strict=False))
        if not a or len(a) != len(b):
            raise Failed(f"**failed**: {len(a)} and {len(b)} adapters were saved")
        return f"{same} of {len(a)} adapters equal" if same == len(a) else f"**{same} of {len(a)}**"


Case = tuple[str, Callable[[], str]]
