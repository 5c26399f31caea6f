"""A base is identified by its weights, wherever they are stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_exp.model.identity import files_hash, identity_of


def test_local_weights_are_identified_by_a_hash_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    files_identity = files_hash(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    assert files_hash(tmp_path, None) == files_identity
    (tmp_path / "b.safetensors").write_bytes(b"twO")
    assert files_hash(tmp_path, None) != files_identity
    (tmp_path / "x.gguf").write_bytes(b"three")
    assert files_hash(tmp_path, "x.gguf") not in (None, files_identity, files_hash(tmp_path, None))


def test_a_folder_without_weights_gives_a_warning(tmp_path: Path) -> None:
    identity, warning = identity_of(None, str(tmp_path), None, None)
    assert identity is None
    assert "no weights that a hash could identify" in str(warning)


def test_a_base_of_the_hub_is_identified_by_its_commit() -> None:
    commit = "0123456789" * 4
    config: Any = SimpleNamespace(_commit_hash=commit)
    assert identity_of(config, "some/where", commit, None) == (commit, None)
    identity, warning = identity_of(config, "some/where", "main", None)
    assert identity == commit
    assert "is not pinned to a commit" in str(warning)
