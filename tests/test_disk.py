"""A disk's refusal is known by its number, and by the words of libraries that keep that back."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.disk import refusal

WRITE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from lora_exp.disk import refusal
tensor, path = torch.ones(2**20), Path("disk/file")
writes = {
    "python": lambda: path.write_text("x" * 2**21),
    "torch": lambda: torch.save(tensor, path),
    "safetensors": lambda: save_file({"a": tensor}, path),
}
try:
    writes[sys.argv[1]]()
except Exception as error:
    print(refusal(error, path))
"""


def in_a_small_disk(folder: Path, script: str, size: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a tmpfs at `disk`, in a mount namespace of its own."""
    (folder / "disk").mkdir(exist_ok=True)
    if shutil.which("unshare") is None:
        pytest.skip("this system has no unshare")
    mount = f"mount -t tmpfs -o size={size} tmpfs disk || exit 111"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{mount}; {script}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 111 or "unshare failed" in done.stderr:
        pytest.skip(f"this system lets no tmpfs be mounted: {done.stderr}")
    return done


@pytest.mark.parametrize("writer", ["python", "torch", "safetensors"])
def test_every_librarys_word_for_a_full_disk_is_known(writer: str, tmp_path: Path) -> None:
    (tmp_path / "write.py").write_text(WRITE)
    done = in_a_small_disk(tmp_path, f"{sys.executable} write.py {writer}", "1m")
    assert "disk/file cannot be written: " in done.stdout, done.stdout + done.stderr
    assert "MiB are free); make room" in done.stdout


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    assert refusal(ValueError("space"), tmp_path) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "no such file"), tmp_path) is None
