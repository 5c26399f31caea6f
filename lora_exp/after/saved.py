"""What lies at a path: an adapter, a whole model, a checkpoint, a run or a sweep; without torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_exp.config.door import renamed
from lora_exp.config.pairs import QUANTISATIONS
from lora_exp.config.start import adapter_config
from lora_exp.errors import AdapterError, ConfigError, SavedError
from lora_exp.files.paths import asset, near_names
from lora_exp.files.revision import comparable, named
from lora_exp.record.sweep import best_job

log = logging.getLogger("lora_exp")
CHECKPOINT = "checkpoint-"
NO_BIAS = "none"  # peft's default; adapters of methods without biases have no such setting
MERGE_RECORD = "merge.json"  # what a merged model was made from


@dataclass(frozen=True)
class Saved:
    """Trained weights in a folder, and what is known of their run."""

    folder: Path
    adapter: dict[str, Any] | None  # its adapter_config.json; None: a whole model
    run: Path | None  # the directory with run.json and config.yaml
    alias: str | None = None  # the name that the user gave it

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run's record; empty without a run."""
        return read_json(self.run / "run.json") if self.run else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's config; empty without a run."""
        if self.run is None or not (self.run / "config.yaml").is_file():
            return {}
        try:
            saved = OmegaConf.to_container(OmegaConf.load(self.run / "config.yaml"))
            return dict(renamed(saved))
        except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
            raise SavedError(f"{self.run / 'config.yaml'} cannot be read: {error}") from error

    @property
    def name(self) -> str:
        """Its name: the alias, the folder's name, or the run's if the folder's is generic."""
        name = self.alias or self.folder.name
        run_name = self.record.get("name")
        return str(run_name) if run_name and name in ("adapter", "model") else name

    @property
    def base(self) -> str:
        """The name or path of its base, of a whole model its own folder; empty if unknown."""
        if self.adapter is None:
            return str(self.folder)
        run_base = (self.settings.get("model") or {}).get("path")
        return str(run_base or self.adapter["base_model_name_or_path"] or "")

    @property
    def quant(self) -> str:
        """How its run's base was quantised, as conf/quant names it; a whole model is not."""
        if self.adapter is None:
            return "none"
        chosen = str((self.settings.get("choices") or {}).get("quant", "none"))
        saved_as = self.record.get("saved_as")
        return str(saved_as) if chosen == "none" and saved_as in QUANTISATIONS else chosen

    @property
    def as_chat(self) -> bool:
        """Whether its run made its prompts, which were plain text, turns of a chat."""
        return bool((self.settings.get("data") or {}).get("as_chat"))

    def columns(self, row: Any) -> dict[str, str]:
        """Return the columns that its run read as fields, by the fields, if a row has them."""
        columns: Any = (self.settings.get("data") or {}).get("columns")
        if not isinstance(columns, dict) or not isinstance(row, dict):
            return {}
        names = {str(field): str(column) for field, column in columns.items()}
        return names if {*names.values()} <= row.keys() else {}

    def format(self, row: Any) -> Literal["auto", "unpaired_preference"]:
        """Return `auto`, or the format of its run if that alone reads the label of a row."""
        own = (self.settings.get("data") or {}).get("format")
        is_labelled = isinstance(row, dict) and "label" in row
        return "unpaired_preference" if own == "unpaired_preference" and is_labelled else "auto"

    @property
    def completion_only(self) -> bool:
        """Whether only answers counted in its run's loss; without a run they do."""
        args = (self.settings.get("algorithm") or {}).get("args") or {}
        return bool(args.get("completion_only_loss", True))

    @property
    def bias(self) -> Any:
        """Which biases of the base the adapter trains, by peft's name."""
        return (self.adapter or {}).get("bias", NO_BIAS)

    @property
    def task_type(self) -> str:
        """The task that it was trained for, by peft's name."""
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
        SavedError: nothing of this kind is there, or it is damaged.
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
    names = ", ".join(sorted(p.name for p in folder.glob("*"))[:8])
    found = f"it has {names}" if names else "it is empty" if folder.is_dir() else "it is a file"
    text = "is no adapter (adapter_config.json), model (config.json) or run (run.json)"
    raise SavedError(f"{path} {text}; {found}")


def find_all(paths: Iterable[str | Path]) -> list[Saved]:
    """Return what was saved at several paths; `NAME=PATH` sets a name.

    Raises:
        SavedError: as `find`; or two have the same name, or one of several is a whole model.
        AdapterError: they have different bases.
    """
    several: list[Saved] = []
    for path in map(str, paths):
        alias, _, location = path.partition("=")
        aliased = location and not Path(path).exists() and re.fullmatch(r"[\w.-]+", alias)
        several.append(replace(find(location), alias=alias) if aliased else find(path))
    if len(several) > 1 and (whole_models := [s for s in several if s.adapter is None]):
        text = "is a whole model; only adapters of the same base go together"
        raise SavedError(f"{whole_models[0].folder} {text}")
    names = [saved.name for saved in several]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise SavedError(f"two are called {', '.join(duplicates)}; give names: NAME=PATH")
    check_same_base(several)
    return several


def check_same_base(several: list[Saved]) -> None:
    """Refuse adapters of different bases.

    Raises:
        AdapterError: two bases differ by the hashes that their runs recorded, or else by name.
    """
    first = several[0]
    for saved in several[1:]:
        revisions = first.record.get("base"), saved.record.get("base")
        if comparable(*revisions):
            same = revisions[0] == revisions[1]
        else:
            same = named(first.base) == named(saved.base)
        if not same:
            bases = f"{first.base} ({revisions[0]}) and {saved.base} ({revisions[1]})"
            text = f"{first.folder} and {saved.folder} were trained on different bases: {bases}"
            raise AdapterError(text)


def jobs(folder: Path) -> list[Path]:
    """Return the run directories of a sweep, in their order; empty if it is no sweep."""
    directories = [path.parent for path in folder.glob("*/run.json")]
    numbered = [path for path in directories if path.name.isdigit()]
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
    winner = best_job(folder)
    if winner is None:
        raise SavedError(f"{folder} is a sweep without a best run; give the path of one run")
    log.warning("%s is a sweep; its best run is %s", folder, winner)
    return find(winner)


def _of_run(run: Path) -> Saved:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return find(run / name)
    from lora_exp.training.manifest import checkpoints_by_step, flaw, owner

    checkpoints = checkpoints_by_step(run / "checkpoints")
    for step in sorted(checkpoints, reverse=True):
        folder = checkpoints[step]
        if (run_id := owner(folder)) is not None and flaw(folder, run_id) is None:
            return find(folder)
    status = read_json(run / "run.json").get("status")
    raise SavedError(f"{run} ({status}) has saved nothing yet; resume={run} continues it")


def _check_whole(folder: Path) -> None:
    """Refuse a checkpoint that differs from its manifest."""
    from lora_exp.training.manifest import MANIFEST, flaw, owner

    run_id = owner(folder)
    if (folder / MANIFEST).exists() and (reason := flaw(folder, run_id or "")) is not None:
        raise SavedError(f"{folder} {reason}")


def _run_of(folder: Path) -> Path | None:
    """Return the run of a folder: a parent, or the folder itself if it holds a copied record."""
    parents = [folder]
    if folder.name in ("adapter", "model", "value"):
        parents.append(folder.resolve().parent)
    if folder.name.startswith(CHECKPOINT):
        parents.append(folder.resolve().parent.parent)
    return next((p for p in parents if (p / "run.json").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SavedError: the file is missing or holds none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SavedError(f"{path} cannot be read: {error}") from error
