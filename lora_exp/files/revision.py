"""What identifies a base: a commit on the hub, a hash of local files, else only its name."""

from __future__ import annotations

import re
from pathlib import Path


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit; a branch or tag may move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", str(revision)) is not None


def comparable(one: str | None, other: str | None) -> bool:
    """Return whether two revisions can be compared: both are hashes of files, or both commits."""
    pair = (str(one), str(other))
    return all(r.startswith("sha256:") for r in pair) or all(is_commit(r) for r in pair)


def named(base: str) -> str:
    """Return a base's name without its location, also for a path in the Hub's cache."""
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", f"{base}/")
    return cached[1] if cached else Path(base).name
