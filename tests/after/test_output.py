"""Existing files are only replaced with --force, and only if they are a model or adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_exp.after.completion import generate
from lora_exp.after.output import check_file, check_free, output_folder
from lora_exp.after.saving import save
from lora_exp.errors import SavedError

Trained = Callable[..., Path]


def test_an_output_that_exists_or_cannot_be_created_is_refused_before_anything_loads(
    tmp_path: Path,
) -> None:
    (tmp_path / "there").write_text("mine")
    for out, message in (
        ("there", "exists; --force replaces it"),
        (".", "is a folder; give a file"),
        ("none/out", "is no folder that can be written to"),
    ):
        with pytest.raises(SavedError, match=message):
            generate("nowhere", "nowhere", tmp_path / out)
    assert (tmp_path / "there").read_text() == "mine"


def test_an_output_below_a_file_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SavedError, match="file is no folder that can be written to"):
        save(trained("peft=lora"), tmp_path / "file" / "out")


def test_force_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    adapter, other = tmp_path / "ours", tmp_path / "other"
    for folder, name in ((adapter, "adapter_model.safetensors"), (other, "notes.txt")):
        folder.mkdir()
        (folder / name).touch()
    check_free(tmp_path / "new", force=False)
    check_free(adapter, force=True)
    for folder, force, sources, message in (
        (adapter, False, [], "exists; --force replaces it"),
        (adapter, True, [adapter], "is also the input"),
        (other, True, [], "does not hold only a model or adapter"),
    ):
        with pytest.raises(SavedError, match=message):
            check_free(folder, force, sources)


def test_an_output_never_replaces_its_source(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.touch()
    with pytest.raises(SavedError, match="is also the input; give another path"):
        check_file(source, True, str(source))


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, force=False) as folder:
        (folder / "one.safetensors").write_text("first")
        with (
            pytest.raises(SavedError, match="is being written by another process"),
            output_folder(out, force=True),
        ):
            raise AssertionError
        with output_folder(tmp_path / "other", force=False) as second:
            (second / "two.safetensors").write_text("second")
    assert (out / "one.safetensors").read_text() == "first"
    with (
        pytest.raises(SavedError, match="exists; --force replaces it"),
        output_folder(out, force=False),
    ):
        raise AssertionError  # written since
    with output_folder(out, force=True) as folder:
        (folder / "one.safetensors").write_text("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
