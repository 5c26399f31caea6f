"""Paths: of the package, of the cache, and how a path is distinguished from a dotted name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.errors import ConfigError
from lora_exp.files.paths import SCRATCH, asset, cache_dir, is_path, is_scratch, near_names


def test_a_package_path_finds_a_file_of_the_package() -> None:
    assert (asset("pkg://lora_exp/assets/tiny") / "config.json").is_file()
    assert (asset("pkg://hydra/conf") / "__init__.py").is_file()
    assert asset("./here") == Path("here")
    with pytest.raises(ConfigError, match="no package"):
        asset("pkg://not_installed/x")


def test_older_model_cards_import_asset_from_config() -> None:
    from lora_exp.config import asset as in_config

    assert in_config is asset


@pytest.mark.parametrize("name", ["a/b", "./a", "../a", "~", ".", "~/a"])
def test_a_folder_is_distinguished_from_a_dotted_name(name: str) -> None:
    assert is_path(name)
    assert not is_path("lora_exp.rewards.exact_match")


def test_lora_exp_cache_takes_precedence_over_the_users_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", "mine")
    assert cache_dir() == Path("mine")
    monkeypatch.delenv("LORA_EXP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "theirs")
    assert cache_dir() == Path("theirs/lora-exp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/lora-exp"


def test_a_folder_that_is_deleted_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / f"{SCRATCH}x"
    assert is_scratch(scratch / "run/3/adapter")
    assert not is_scratch(tmp_path / "run")
    scratch.mkdir()
    monkeypatch.chdir(scratch)
    assert is_scratch(Path("run"))


def test_similar_names_are_suggested_for_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "row.gguf").touch()
    assert near_names(tmp_path / "row.jsonl") == " (did you mean rows.jsonl?)"
    assert near_names(tmp_path / "rows.gguf", "*.gguf") == " (did you mean row.gguf?)"
    assert near_names(tmp_path / "nowhere" / "x") == ""
