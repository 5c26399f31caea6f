"""What lies at a path: an adapter, a whole model, a checkpoint, a run or a sweep; without torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_exp.config.composition import compose
from lora_exp.config.door import CONF, renamed
from lora_exp.config.start import adapter_config
from lora_exp.config.validation import TASKS
from lora_exp.errors import AdapterError, ConfigError, SavedError
from lora_exp.files.paths import asset, near_names
from lora_exp.files.revision import comparable, is_commit, named
from lora_exp.record.sweep import best

log = logging.getLogger("lora_exp")
CHECKPOINT = "checkpoint-"
RECORD = "merge.json"  # of what a merged model was made
# what a run's config may say of how its base is held: settings, never what else to call
HELD = ("lora_exp.model.loading.bnb_4bit", "lora_exp.model.loading.bnb_8bit")
LOADED = ("path", "revision", "gguf_file", "dtype", "random_weights")
# transformers would fetch code for other names, and a run's config comes from anywhere
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


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
        return read_json(self.run / "run.json") if self.run else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's config, or nothing."""
        if self.run is None or not (self.run / "config.yaml").is_file():
            return {}
        try:
            saved = OmegaConf.to_container(OmegaConf.load(self.run / "config.yaml"))
            return dict(renamed(saved))
        except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
            raise SavedError(f"{self.run / 'config.yaml'} cannot be read: {error}") from error

    @property
    def name(self) -> str:
        """What to call it among others."""
        own = self.alias or self.folder.name
        known = self.record.get("name")
        return str(known) if known and own in ("adapter", "model") else own

    @property
    def base(self) -> str:
        """The base that it names, a whole model itself; empty: it names none."""
        if self.adapter is None:
            return str(self.folder)
        told = (self.settings.get("model") or {}).get("path")
        return str(told or self.adapter["base_model_name_or_path"] or "")

    @property
    def quant(self) -> str:
        """The option that its run held the base by; a whole model is held as it is."""
        chosen = self.settings.get("choices") or {}
        return str(chosen.get("quant", "none")) if self.adapter is not None else "none"

    @property
    def task_type(self) -> str:
        """What it was trained for, in peft's word."""
        if self.adapter is not None:
            return str(self.adapter.get("task_type") or "CAUSAL_LM")
        config = read_json(self.folder / "config.json")
        architectures = config.get("architectures") or [""]
        if str(architectures[0]).endswith("ForSequenceClassification"):
            return "SEQ_CLS"
        return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else "CAUSAL_LM"


def find(path: str | Path) -> Saved:
    """Return what was saved at a path.

    Args:
        path: an adapter, a whole model, a checkpoint, a run (its result, or its newest whole
            checkpoint where it has not ended), or a sweep (its best run).

    Raises:
        SavedError: there is nothing of the kind, or it is damaged.
    """
    folder = asset(str(path))
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if (folder / "run.json").is_file():
        return _of_run(folder)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise SavedError(f"{path} has a config.json but no weights (*.safetensors)")
        return Saved(folder, None, _run_of(folder))
    if not folder.exists():
        near = near_names(folder)
        raise SavedError(f"{path} does not exist{near}")
    if jobs(folder):
        return _of_sweep(folder)
    there = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) if folder.is_dir() else "a file"
    text = "is no adapter (adapter_config.json), model (config.json) or run (run.json)"
    raise SavedError(f"{path} {text}; there is {there or 'nothing'}")


def find_all(paths: Iterable[str | Path]) -> list[Saved]:
    """Return what was saved at several paths; `NAME=PATH` gives one another name.

    Raises:
        SavedError: as `find`; or two have one name, or a whole model is among several.
        AdapterError: they name different bases.
    """
    found: list[Saved] = []
    for path in map(str, paths):
        alias, _, place = path.partition("=")
        aliased = place and not Path(path).exists() and re.fullmatch(r"[\w.-]+", alias)
        found.append(replace(find(place), alias=alias) if aliased else find(path))
    if len(found) > 1 and (whole := [s for s in found if s.adapter is None]):
        raise SavedError(f"{whole[0].folder} is a whole model; several must be adapters of a base")
    names = [saved.name for saved in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SavedError(f"two are called {', '.join(twice)}; name them: NAME=PATH")
    check_same_base(found)
    return found


def check_same_base(several: list[Saved]) -> None:
    """Refuse adapters of different bases.

    Raises:
        AdapterError: two differ in the weights that their runs recorded, or else in name.
    """
    first = several[0]
    for saved in several[1:]:
        known, other = first.record.get("base"), saved.record.get("base")
        same = (
            known == other if comparable(known, other) else named(first.base) == named(saved.base)
        )
        if not same:
            bases = f"{first.base} ({known}) and {saved.base} ({other})"
            text = f"{first.folder} and {saved.folder} were trained on two bases: {bases}"
            raise AdapterError(text)


def claim(base: str) -> tuple[str, str]:
    """Return what a base is said to be, and where it lies: two of `NAME=PLACE`, else the same."""
    name, _, place = base.partition("=")
    return (name, place) if place and not Path(base).exists() else (base, base)


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


def _of_sweep(folder: Path) -> Saved:
    winner = best(folder)
    if winner is None:
        raise SavedError(f"{folder} is a sweep of which no run has finished; name one of them")
    log.warning("%s is a sweep; its best is %s", folder, winner)
    return find(winner)


def _of_run(run: Path) -> Saved:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return find(run / name)
    from lora_exp.training.checkpoint import flaw, numbered, owner

    checkpoints = numbered(run / "checkpoints")
    for step in sorted(checkpoints, reverse=True):
        folder = checkpoints[step]
        if (its := owner(folder)) is not None and flaw(folder, its) is None:
            return find(folder)
    status = read_json(run / "run.json").get("status")
    raise SavedError(f"{run} ({status}) has saved nothing yet; resume={run} goes on")


def _check_whole(folder: Path) -> None:
    """Refuse a checkpoint that its manifest does not vouch for."""
    from lora_exp.training.checkpoint import MANIFEST, flaw, owner

    its = owner(folder)
    if (folder / MANIFEST).exists() and (wrong := flaw(folder, its or "")) is not None:
        raise SavedError(f"{folder} {wrong}")


def _run_of(folder: Path) -> Path | None:
    """Return the run that a folder belongs to: around it, or, where it travels, inside it."""
    parents = [folder]
    if folder.name in ("adapter", "model", "value"):
        parents.append(folder.resolve().parent)
    if folder.name.startswith(CHECKPOINT):
        parents.append(folder.resolve().parent.parent)
    return next((p for p in parents if (p / "run.json").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SavedError: it is none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SavedError(f"{path} cannot be read: {error}") from error


def base_config(saved: Saved, base: str | None = None, quant: str | None = None) -> DictConfig:
    """Return a config that loads the base of what was saved.

    Args:
        saved: what stands on it.
        base: another place of the same base: an option of conf/model, a folder or a hub id;
            `NAME=PLACE` where it is called otherwise there.
        quant: an option of conf/quant; None: as its run held it, not at all where there was none.

    Raises:
        SavedError: it names no base, or one that is loaded by other code than ours, or it is for
            another task than we have.
        ConfigError: no such option.
    """
    base = base and claim(base)[1]
    chosen = base or saved.base
    if not chosen:
        raise SavedError(f"{saved.folder} names no base; give --base")
    if (Path(chosen).expanduser() / "adapter_config.json").is_file():
        raise SavedError(f"{chosen} is an adapter, not a base")
    if saved.task_type not in TASKS:
        text = f"is for {saved.task_type}; lora-exp has {', '.join(TASKS)}"
        raise SavedError(f"{saved.folder} {text}")
    if (
        base is not None
        and Path(base).is_dir()
        and not ((Path(base) / "config.json").is_file() or any(Path(base).glob("*.gguf")))
    ):
        raise SavedError(f"{base} is a folder without a model")
    is_option = base is not None and (CONF / "model" / f"{base}.yaml").is_file()
    option = chosen if is_option else "local"
    path = [] if is_option else ["model.path=here"]
    cfg = compose("tracking=none", f"model={option}", *path, f"quant={quant or 'none'}")
    values: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    if not is_option:
        values["model"]["path"] = chosen
    values["model"]["attn_implementation"] = _attention(saved)
    if base is None and saved.adapter is not None:
        told = _settings(saved, "model", ("lora_exp.model.loading.load",))
        values["model"] |= {key: told[key] for key in LOADED if key in told}
        if is_commit(recorded := saved.record.get("base")):
            values["model"]["revision"] = recorded
    if quant is None and saved.adapter is not None:
        values["quant"] = _settings(saved, "quant", HELD) or None
    values["algorithm"]["task_type"] = saved.task_type
    return OmegaConf.create(values)


def _attention(saved: Saved) -> str | None:
    """Return how its run computed attention; None: as the architecture does, some have no sdpa."""
    node = saved.settings.get("model")
    chosen = node.get("attn_implementation") if isinstance(node, dict) else None
    return chosen if chosen in ATTENTION else None


def _settings(saved: Saved, key: str, targets: tuple[str, ...]) -> dict[str, Any]:
    """Return a part of a run's config, if all that it says is settings of what we call.

    Raises:
        SavedError: it would have something else called; a config travels, and comes from anywhere.
    """
    node = saved.settings.get(key) or {}
    target = node.get("_target_") if isinstance(node, dict) else node
    values = node.values() if isinstance(node, dict) else [node]
    if node and (target not in targets or any(isinstance(v, dict | list) for v in values)):
        cure = "give --base" if key == "model" else "give --quant"
        raise SavedError(f"{saved.run}/config.yaml: {key} is {target!r}, not ours; {cure}")
    return dict(node)
