"""The name of a run, made of what was chosen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_exp.config.overrides import split_override
from lora_exp.files.redaction import redact

NAME_LENGTH = 48  # fits a column of a table
NOT_IN_NAME = re.compile(
    r"(name|sweep_name|resume|retry_failed|report|strict|host|trusted_targets|tracking|hydra|samples"
    r"|objective|goal|early_stopping"
    r"|lockstep|model\.gguf_file|data\.num_proc)\b"
    r"|train\.(eval|save|logging)_"
)


def run_name(
    values: Mapping[str, Any], overrides: Iterable[str], common: Iterable[str] | None
) -> str:
    """Return a name of method, rank, quantisation, targets and overrides.

    Of a job of a sweep it keeps what differs between the jobs; what all share is left out where
    there is no room, and a hash tells apart what is cut.

    Args:
        values: the settled config, with `choices`.
        overrides: those of the command line.
        common: keys that all jobs of the sweep share; None: no sweep.
    """
    choices, peft = values["choices"], values["peft"] or {}
    given = {split_override(override)[0] for override in overrides}
    varied = set() if common is None else given - set(common)
    rank = f"r{peft['r']}" if peft.get("r") else ""
    targets = choices["targets"] if peft.get("target_modules") == values["targets"] else ""
    method = {"lora": "", "none": "full"}.get(choices["peft"], choices["peft"])
    of_groups = {"peft": method, "peft.r": rank, "quant": choices["quant"], "targets": targets}
    parts = [(text, key in varied) for key, text in of_groups.items()]
    ambiguous, overrides = [], list(overrides)
    for override, shown in zip(overrides, redact(overrides), strict=True):
        key, value = split_override(override)
        if key in of_groups or NOT_IN_NAME.match(key) or key in (common or ()):
            continue
        if shown != override:
            continue
        parts.append((_part(override, choices), key in varied))
        ambiguous += [override] if key in varied and "/" in value.rstrip("/") else []
    words = [(re.sub(r"[^\w.=,+-]+", "_", text), differs) for text, differs in parts]
    words = [(word, differs) for word, differs in words if word not in ("", "none")]
    return _joined(words, ambiguous)


def _part(override: str, choices: Mapping[str, Any]) -> str:
    """Return an override as a part of a name; of a path, only its last part."""
    key, value = split_override(override)
    if override.startswith("~"):
        return f"without_{key.rpartition('.')[2]}"
    value = value.rstrip("/").rpartition("/")[2]
    return value if key in choices else f"{key.rpartition('.')[2]}={value}"


def _joined(parts: list[tuple[str, bool]], ambiguous: list[str]) -> str:
    """Join the parts of a name that have room, those first by which jobs differ.

    Args:
        parts: texts, and whether jobs differ by them.
        ambiguous: overrides by which jobs differ, and whose texts do not show how.
    """
    needed = "-".join(text for text, differs in parts if differs)
    ending = ""
    if ambiguous or len(needed) > NAME_LENGTH:
        digest = hashlib.sha256(" ".join([needed, *ambiguous]).encode()).hexdigest()
        ending = f"-{digest[:4]}"
    room = NAME_LENGTH - len(ending)
    kept = [False] * len(parts)
    for i in sorted(range(len(parts)), key=lambda i: not parts[i][1]):
        text = parts[i][0]
        length = len("-".join(t for (t, _), k in zip(parts, kept, strict=True) if k))
        kept[i] = not length or length + 1 + len(text) <= room
    name = "-".join(text for (text, _), keep in zip(parts, kept, strict=True) if keep)
    return name[:room] + ending
