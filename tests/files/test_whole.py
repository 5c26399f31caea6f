"""Folders are whole or absent, and a full or read-only disk is distinguished from other errors."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.errors import CheckpointError
from lora_exp.files.whole import clear, refusal, whole

WRITE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from lora_exp.files.whole import refusal
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


def run_on_a_small_disk(folder: Path, script: str, size: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a tmpfs at `disk`, in its own mount namespace."""
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
def test_every_librarys_message_for_a_full_disk_is_recognised(writer: str, tmp_path: Path) -> None:
    (tmp_path / "write.py").write_text(WRITE)
    done = run_on_a_small_disk(tmp_path, f"{sys.executable} write.py {writer}", "1m")
    assert "disk/file cannot be written: " in done.stdout, done.stdout + done.stderr
    assert "MiB are free); make room" in done.stdout


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    assert refusal(ValueError("space"), tmp_path) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "no such file"), tmp_path) is None


def test_a_write_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with whole(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole(final) as folder:  # noqa: PT012
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert (final / "a").read_text() == "old"
    with whole(final) as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_error_about_a_full_disk_names_the_free_space(tmp_path: Path) -> None:
    def write_to_full_disk() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    message = r"No space left on device.*MiB are free"
    with pytest.raises(CheckpointError, match=message), whole(tmp_path / "adapter"):
        write_to_full_disk()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with whole(final) as folder:
        (folder / "a").write_text("old")
    (tmp_path / ".staged-adapter").mkdir()  # killed between two renames
    final.rename(tmp_path / ".staged-adapter/old")
    clear(tmp_path)
    assert (final / "a").read_text() == "old"
    assert not (tmp_path / ".staged-adapter").exists()
