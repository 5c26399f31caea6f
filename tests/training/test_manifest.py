"""A manifest says whose a checkpoint is, and whether it is whole; on files alone."""

from __future__ import annotations

from pathlib import Path

from lora_exp.training.manifest import MANIFEST, checkpoints_by_step, flaw, newest, owner, seal


def checkpoint(folder: Path, step: int, run: str = "a") -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "part").mkdir(parents=True)
    (path / "weights").write_bytes(bytes([step] * 9))
    (path / "part" / "state").write_text(f"{step}")
    seal(path, run, step)
    return path


def test_a_sealed_checkpoint_has_no_flaw_and_names_its_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 7)
    assert flaw(path, "a") is None
    assert owner(path) == "a"
    assert flaw(path, "b") == "belongs to another run"
    moved = path.rename(tmp_path / "checkpoint-8")
    assert flaw(moved, "a") == "belongs to another run"
    assert owner(tmp_path) is None


def test_a_changed_missing_or_added_file_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "extra").write_text("x")
    assert flaw(path, "a") == "has files that it was not saved with: extra"
    (path / "extra").unlink()
    (path / "part" / "state").write_text("2")
    assert flaw(path, "a") == "is damaged: part/state changed since it was written"
    (path / "weights").unlink()
    assert flaw(path, "a") == "lacks weights"
    (path / MANIFEST).unlink()
    assert flaw(path, "a") == f"has no {MANIFEST}"


def test_the_newest_intact_checkpoint_of_the_run_is_taken(tmp_path: Path) -> None:
    paths = {step: checkpoint(tmp_path, step) for step in (2, 10, 9)}
    checkpoint(tmp_path, 30, run="b")
    (paths[10] / "weights").write_text("cut")
    assert newest(tmp_path, "a") == (paths[9], 9)
    assert sorted(checkpoints_by_step(tmp_path)) == [2, 9]
    assert newest(tmp_path / "none", "a") == (None, 0)
