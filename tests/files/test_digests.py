"""The hash of a large file is computed once, and anew when the file may have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_exp.files import digests
from lora_exp.files.whole import sha256


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list of the files that are really read."""
    read: list[Path] = []

    def count(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(digests, "sha256", count)
    monkeypatch.setattr(digests, "SMALLEST", 4)
    monkeypatch.setattr(digests, "SETTLED", 0)
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    return read


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def test_a_file_that_has_not_changed_is_read_once(hashed: list[Path], weights: Path) -> None:
    assert digests.digest(weights) == digests.digest(weights) == sha256(weights)
    assert len(hashed) == 1


def test_a_changed_file_is_read_again(hashed: list[Path], weights: Path) -> None:
    first, status = digests.digest(weights), weights.stat()
    weights.write_bytes(b"Weights")  # the same size and inode, and its old time
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.digest(weights) == sha256(weights) != first
    other = weights.with_name("other")
    other.write_bytes(b"WEIGHTS")
    other.replace(weights)
    assert digests.digest(weights) == sha256(weights)
    assert len(hashed) == 3


def test_small_and_new_files_are_always_read(
    hashed: list[Path], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", 10**12)
    digests.digest(weights)
    digests.digest(weights)
    monkeypatch.setattr(digests, "SETTLED", 0)
    monkeypatch.setattr(digests, "SMALLEST", 8)
    digests.digest(weights)
    digests.digest(weights)
    assert len(hashed) == 4


def test_a_damaged_entry_is_not_used_and_an_empty_setting_asks_for_none(
    hashed: list[Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests.digest(weights)
    (entry,) = (tmp_path / "cache/hashes").iterdir()
    entry.write_text("[]")
    assert digests.digest(weights) == sha256(weights)
    monkeypatch.setenv("LORA_EXP_CACHE", "")
    assert digests.digest(weights) == sha256(weights)
    assert len(hashed) == 3
