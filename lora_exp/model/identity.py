"""What identifies a base's weights: the hub's commit, or a hash of local files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lora_exp.files.digests import digest
from lora_exp.files.paths import asset
from lora_exp.files.revision import is_commit
from lora_exp.files.whole import sha256

# what a base is made of beside its weights: shapes, tokenizer, templates
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat_template*",
)  # fmt: skip


def identity_of(
    config: Any, path: str, revision: str | None, gguf_file: str | None
) -> tuple[str | None, str | None]:
    """Return what identifies a base's weights, and a warning if they are hard to find again.

    Args:
        config: the base's, as it was read.
        path: `model.path` of the config.
        revision: `model.revision` of the config.
        gguf_file: the GGUF file in it, if the weights are GGUF.

    Returns:
        The hub's commit or a hash of the local files, or None; a warning, or None.
    """
    if not asset(path).exists():
        commit = getattr(config, "_commit_hash", None)
        text = f"model.revision: {path} is not pinned to a commit; later runs may get other weights"
        return commit, None if is_commit(revision) else text
    files = files_hash(asset(path), gguf_file)
    text = f"model.path: {path} holds no weights that a hash could identify"
    return files, None if files else text


def files_hash(folder: Path, gguf_file: str | None) -> str | None:
    """Return the hash of a folder's weights, in the order of their names, or None: it has none."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    files = [folder / gguf_file] if gguf_file else sorted(weights)
    if not files:
        return None
    together = hashlib.sha256()
    for file in files:
        together.update(bytes.fromhex(digest(file)))
    return f"sha256:{together.hexdigest()}"


def small_files(path: str) -> dict[str, str]:
    """Return the hashes of a local base's config, tokenizer and templates, by file name.

    Args:
        path: `model.path` of the config; of a hub's model its commit says all of this.
    """
    folder = asset(path)
    files = {file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: f"sha256:{sha256(file)}" for file in sorted(files)}
