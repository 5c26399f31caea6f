"""Keep secrets out of files; they are recognised by key, by format, or by the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"
# eos_token, pad_token, max_new_tokens and the like are not secrets
NAME = (
    r"(?:hub|api|auth|access|hf|wandb|bearer)_token|token"
    r"|(?:\w+_)?(?:secret|password|passwd|api_?key)"
)
KEY = re.compile(NAME, re.I)
OWN_TEXTS = r"is a secret,|belongs to the run;"  # faults of such keys, without the value
ASSIGNED = re.compile(
    rf"(?<!\w)((?:{NAME})\s*[=:]\s*['\"]?)(?!null\b|{OWN_TEXTS})[^\s'\",\]}}]+", re.I
)
ENVIRONMENT = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.I)
SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{20,}|wandb_v1_\w{20,})"
)


def redact(value: Any) -> Any:
    """Return nested dicts and lists with the secrets replaced by `<redacted>`."""
    return _redacted(value, tuple(_environment()))


def redact_text(text: str) -> str:
    """Replace tokens of known formats, secrets in the environment, and `key=...` or `key: ...`."""
    return _redacted_text(text, tuple(_environment()))


def secret_keys(value: Any) -> list[str]:
    """Return the dotted keys at which nested dicts and lists hold secrets."""
    return list(_secret_keys(value, tuple(_environment()), ""))


def _secret_keys(value: Any, secrets: tuple[str, ...], key: str) -> Iterator[str]:
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            full_key = f"{key}.{name}" if key else str(name)
            if isinstance(value, dict) and item and KEY.fullmatch(str(name)):
                yield full_key
            elif isinstance(item, str):
                if _redacted_value(item, secrets) != item:
                    yield full_key
            elif isinstance(item, dict | list):
                yield from _secret_keys(item, secrets, full_key)


def _environment() -> list[str]:
    """Return the secrets in the environment, of which there are few: texts to redact are many."""
    values = (os.environ[name] for name in os.environ if _names_secret(name))
    return [value for value in values if len(value) >= 8]


@lru_cache(maxsize=4096)  # the environment is read for every text
def _names_secret(variable: str) -> bool:
    return ENVIRONMENT.search(variable) is not None


def _redacted(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: REDACTED if KEY.fullmatch(str(key)) and item else _redacted(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, secrets) for item in value]
    return _redacted_value(value, secrets) if isinstance(value, str) else value


@lru_cache(maxsize=4096)  # the jobs of a sweep have most values in common
def _redacted_value(text: str, secrets: tuple[str, ...]) -> str:
    return _redacted_text(text, secrets)


def _redacted_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return ASSIGNED.sub(rf"\1{REDACTED}", SHAPES.sub(REDACTED, text))


def redact_files(folder: Path, pattern: str = "*.yaml") -> None:
    """Redact the YAML files that Hydra wrote before our code ran."""
    for path in folder.glob(pattern):
        text = path.read_text(encoding="utf-8")
        if (clean := redact_text(text)) != text:
            path.write_text(clean, encoding="utf-8")
