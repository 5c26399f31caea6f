"""What lies at a path: an adapter, a whole model, a checkpoint, a run or a sweep; without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config import CONF, compose
from lora_exp.errors import ConfigError, SavedError, did_you_mean
from lora_exp.start import adapter_config

CHECKPOINT = "checkpoint-"
TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Saved:
    """Trained weights in a folder, and what is known of the run that made them."""

    folder: Path
    adapter: dict[str, Any] | None  # its adapter_config.json; None: a whole model
    run: Path | None  # the directory with run.json and config.yaml
    alias: str | None = None  # what the user calls it

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run's record, or nothing."""
        return _json(self.run / "run.json") if self.run else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's config, or nothing."""
        if self.run is None or not (self.run / "config.yaml").is_file():
            return {}
        try:
            return dict(OmegaConf.to_container(OmegaConf.load(self.run / "config.yaml")))  # type: ignore[arg-type]
        except (OSError, ValueError, OmegaConfBaseException) as error:
            raise SavedError(f"{self.run / 'config.yaml'} cannot be read: {error}") from error

    @property
    def name(self) -> str:
        """What to call it among others."""
        own = self.alias or self.folder.name
        known = self.record.get("name")
        return str(known) if known and own in ("adapter", "model") else own

    @property
    def base(self) -> str:
        """The base that it names, a whole model itself."""
        if self.adapter is None:
            return str(self.folder)
        told = self.settings.get("model", {}).get("path")
        return str(told or self.adapter["base_model_name_or_path"])

    @property
    def task_type(self) -> str:
        """What it was trained for, in peft's word."""
        if self.adapter is not None:
            return str(self.adapter.get("task_type") or "CAUSAL_LM")
        architectures = _json(self.folder / "config.json").get("architectures") or [""]
        return next((t for end, t in TASKS.items() if architectures[0].endswith(end)), "CAUSAL_LM")


def find(path: str | Path) -> Saved:
    """Return what was saved at a path.

    Args:
        path: an adapter, a whole model, a checkpoint, or a run: its result, or its newest whole
            checkpoint where it has not ended.

    Raises:
        SavedError: there is nothing of the kind, or it is damaged.
    """
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if (folder / "run.json").is_file():
        return _of_run(folder)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise SavedError(f"{path} has a config.json but no weights (*.safetensors)")
        return Saved(folder, None, _run_of(folder))
    if not folder.exists():
        near = did_you_mean(folder.name, (p.name for p in folder.parent.glob("*")))
        raise SavedError(f"{path} does not exist{near}")
    if jobs(folder):
        raise SavedError(f"{path} is a sweep of {len(jobs(folder))} runs; name one of them")
    there = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) if folder.is_dir() else "a file"
    text = "is no adapter (adapter_config.json), model (config.json) or run (run.json)"
    raise SavedError(f"{path} {text}; there is {there or 'nothing'}")


def find_all(paths: Iterable[str | Path]) -> list[Saved]:
    """Return what was saved at several paths; `NAME=PATH` gives one another name.

    Raises:
        SavedError: as `find`; or two have one name, or a whole model is among several.
    """
    found: list[Saved] = []
    for path in map(str, paths):
        alias, told, place = path.partition("=")
        named = told and not Path(path).exists() and re.fullmatch(r"[\w.-]+", alias)
        found.append(replace(find(place), alias=alias) if named else find(path))
    if len(found) > 1 and (whole := [s for s in found if s.adapter is None]):
        raise SavedError(f"{whole[0].folder} is a whole model; several must be adapters of a base")
    names = [saved.name for saved in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SavedError(f"two are called {', '.join(twice)}; name them: NAME=PATH")
    return found


def jobs(folder: Path) -> list[Path]:
    """Return the run directories of a sweep, in their order; empty if it is none."""
    found = [path.parent for path in folder.glob("*/run.json")]
    numbered = [path for path in found if path.name.isdigit()]
    return sorted(numbered, key=lambda path: int(path.name))


def _adapter(folder: Path) -> Saved:
    try:
        config = adapter_config(str(folder))
    except ConfigError as error:
        raise SavedError(error.faults[0][1]) from error
    if folder.name.startswith(CHECKPOINT):
        _check_whole(folder)
    return Saved(folder, config, _run_of(folder))


def _of_run(run: Path) -> Saved:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return find(run / name)
    from lora_exp.checkpoint import flaw, numbered, owner

    checkpoints = numbered(run / "checkpoints")
    for step in sorted(checkpoints, reverse=True):
        folder = checkpoints[step]
        if (its := owner(folder)) is not None and flaw(folder, its) is None:
            return find(folder)
    status = _json(run / "run.json").get("status")
    raise SavedError(f"{run} ({status}) has saved nothing yet; resume={run} goes on")


def _check_whole(folder: Path) -> None:
    """Refuse a checkpoint that its manifest does not vouch for."""
    from lora_exp.checkpoint import MANIFEST, flaw, owner

    its = owner(folder)
    if (folder / MANIFEST).exists() and (wrong := flaw(folder, its or "")) is not None:
        raise SavedError(f"{folder} {wrong}")


def _run_of(folder: Path) -> Path | None:
    """Return the run that a folder belongs to: around it, or, where it travels, inside it."""
    parents = [folder, folder.resolve().parent]
    if folder.name.startswith(CHECKPOINT):
        parents.append(folder.resolve().parent.parent)
    return next((p for p in parents if (p / "run.json").is_file()), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SavedError(f"{path} cannot be read: {error}") from error


def base_config(saved: Saved, base: str | None = None, quant: str | None = None) -> DictConfig:
    """Return a config that loads the base of what was saved.

    Args:
        saved: what stands on it.
        base: another place of the same base: an option of conf/model, a folder or a hub id.
        quant: an option of conf/quant; None: as its run held it, not at all where there was none.

    Raises:
        hydra.errors.HydraException: no such option.
    """
    chosen = base or saved.base
    is_option = base is not None and (CONF / "model" / f"{base}.yaml").is_file()
    option = chosen if is_option else "local"
    path = [] if is_option else ["model.path=here"]
    cfg = compose("tracking=none", f"model={option}", *path, f"quant={quant or 'none'}")
    values: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    if base is None and saved.adapter is not None and saved.settings:
        values["model"] |= saved.settings["model"] | {"trust_remote_code": False}
    elif not is_option:
        values["model"]["path"] = chosen
    if quant is None and saved.settings:
        values["quant"] = saved.settings["quant"]
    values["algorithm"]["task_type"] = saved.task_type
    return OmegaConf.create(values)
