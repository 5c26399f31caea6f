"""What identifies a base's weights: a hub's commit, or the hash of local files."""

from __future__ import annotations

import re


def is_commit(revision: str | None) -> bool:
    """Tell a commit from a branch or tag, which may move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", str(revision)) is not None


def comparable(known: str | None, found: str | None) -> bool:
    """Say whether two revisions can be compared: both hashes of files, or both commits."""
    pair = (str(known), str(found))
    return all(r.startswith("sha256:") for r in pair) or all(is_commit(r) for r in pair)
