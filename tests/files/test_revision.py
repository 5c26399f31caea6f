"""A commit or a hash of files identifies weights; one cannot be compared with the other."""

from __future__ import annotations

from lora_exp.files.revision import comparable, is_commit, named

COMMIT = "a" * 40


def test_a_commit_is_distinguished_from_a_branch() -> None:
    assert is_commit(COMMIT)
    assert not any(map(is_commit, (None, "main", "A" * 40, "a" * 39, f"sha256:{COMMIT}")))


def test_only_two_commits_or_two_hashes_can_be_compared() -> None:
    assert comparable(COMMIT, "b" * 40)
    assert comparable("sha256:1", "sha256:2")
    assert not comparable(COMMIT, "sha256:1")
    assert not comparable(None, COMMIT)
    assert not comparable(None, None)


def test_a_base_has_the_same_name_in_the_hubs_cache() -> None:
    assert named("/cache/models--Qwen--Qwen3-0.6B/snapshots/0123") == "Qwen3-0.6B"
    assert named("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
