"""Weights are known by a hub's commit or by a hash of their files; the two cannot be compared."""

from __future__ import annotations

from lora_exp.revision import comparable, is_commit

COMMIT = "a" * 40


def test_a_commit_is_told_from_a_branch() -> None:
    assert is_commit(COMMIT)
    assert not any(map(is_commit, (None, "main", "A" * 40, "a" * 39, f"sha256:{COMMIT}")))


def test_only_two_commits_or_two_hashes_can_be_compared() -> None:
    assert comparable(COMMIT, "b" * 40)
    assert comparable("sha256:1", "sha256:2")
    assert not comparable(COMMIT, "sha256:1")
    assert not comparable(None, COMMIT)
    assert not comparable(None, None)
