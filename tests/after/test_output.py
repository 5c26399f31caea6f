"""What is there is not written over, unless it is ours and --force was said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_exp.after.completion import generate
from lora_exp.after.output import check_file, check_free, written
from lora_exp.after.saving import save
from lora_exp.errors import SavedError

Trained = Callable[..., Path]


def test_a_place_that_is_taken_or_missing_is_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    for out, said in (
        ("there", "exists; --force replaces it"),
        (".", "is a folder; name a file"),
        ("none/out", "is no folder that can be written to"),
    ):
        with pytest.raises(SavedError, match=said):
            generate("nowhere", "nowhere", tmp_path / out)
    assert (tmp_path / "there").read_text() == "mine"


def test_a_place_below_a_file_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SavedError, match="file is no folder that can be written to"):
        save(trained("peft=lora"), tmp_path / "file" / "out")


def test_force_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder, name in ((ours, "adapter_model.safetensors"), (other, "notes.txt")):
        folder.mkdir()
        (folder / name).touch()
    check_free(tmp_path / "new", force=False)
    check_free(ours, force=True)
    for folder, force, sources, said in (
        (ours, False, [], "exists; --force replaces it"),
        (ours, True, [ours], "is what is read"),
        (other, True, [], "holds something else than a model or adapter"),
    ):
        with pytest.raises(SavedError, match=said):
            check_free(folder, force, sources)


def test_a_file_never_takes_the_place_of_its_source(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.touch()
    with pytest.raises(SavedError, match="is what is read; name another place"):
        check_file(source, True, str(source))


def test_two_at_once_do_not_write_one_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written(out, force=False) as made:
        (made / "one.safetensors").write_text("first")
        with (
            pytest.raises(SavedError, match="is being written by another process"),
            written(out, force=True),
        ):
            raise AssertionError
        with written(tmp_path / "other", force=False) as second:
            (second / "two.safetensors").write_text("second")
    assert (out / "one.safetensors").read_text() == "first"
    with pytest.raises(SavedError, match="exists; --force replaces it"), written(out, force=False):
        raise AssertionError  # it was not there when the second one began
    with written(out, force=True) as made:
        (made / "one.safetensors").write_text("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
