"""What identifies a base: a hub's commit, or the hash of local files; else its name."""

from __future__ import annotations

import re
from pathlib import Path


def is_commit(revision: str | None) -> bool:
    """Tell a commit from a branch or tag, which may move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", str(revision)) is not None


def comparable(known: str | None, found: str | None) -> bool:
    """Say whether two revisions can be compared: both hashes of files, or both commits."""
    pair = (str(known), str(found))
    return all(r.startswith("sha256:") for r in pair) or all(is_commit(r) for r in pair)


def named(base: str) -> str:
    """Return what a base is called wherever it lies: in the Hub's cache too."""
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", f"{base}/")
    return cached[1] if cached else Path(base).name
