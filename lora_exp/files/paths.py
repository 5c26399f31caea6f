"""Paths: files shipped with the package, the cache, and what tells a path from a name."""

from __future__ import annotations

import os
from pathlib import Path

from lora_exp.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).parent.parent
SCRATCH = "lora-exp-reproduce-"  # how folders are named that their command deletes


def asset(path: str) -> Path:
    """Resolve `pkg://package/file`, as Hydra writes it, to the file in the installed package.

    Any other path is returned unchanged.

    Raises:
        ConfigError: no such package is installed.
    """
    if not path.startswith("pkg://"):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix("pkg://").partition("/")
    if package == "lora_exp":
        return PACKAGE / rest
    from importlib.util import find_spec

    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError([(path, f"no package {package!r} is installed")])
    return Path(spec.submodule_search_locations[0]) / rest


def is_path(name: str) -> bool:
    """Return whether a string is a path and not a dotted name."""
    return "/" in name or name.startswith(("~", "."))


def is_scratch(path: Path) -> bool:
    """Return whether a path will be gone when its command has ended, so that nobody is shown it."""
    return any(part.startswith(SCRATCH) for part in path.absolute().parts)


def near_names(path: Path, pattern: str = "*") -> str:
    """Return ` (did you mean a, b?)`: the nearest names in the folder of a missing path."""
    if path.exists() and pattern == "*":
        return ""
    return did_you_mean(path.name, (sibling.name for sibling in path.parent.glob(pattern)))


def cache_dir() -> Path:
    """Return the cache directory: `LORA_EXP_CACHE`, else one in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LORA_EXP_CACHE") or Path(home) / "lora-exp")


def results_dir(kind: str) -> Path | None:
    """Return the folder of cached results of a kind; None: `LORA_EXP_CACHE=` asks for none."""
    return None if os.environ.get("LORA_EXP_CACHE") == "" else cache_dir() / kind
