"""The adapter that a run starts from: what its config says, read without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.overrides import parted
from lora_exp.errors import ConfigError
from lora_exp.files.paths import near_names
from lora_exp.files.revision import comparable, named

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# peft_type -> the config class; shortened, the class is the type everywhere else
CLASSES = {"P_TUNING": "PromptEncoderConfig"}
KINDS = {"LORA": "lora", "P_TUNING": "p_tuning"}
# what a run may say otherwise than the adapter did
RUNTIME = ("_target_", "target_modules", "init_lora_weights", "feedforward_modules")


def adapter_config(path: str) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        ConfigError: there is no adapter in the folder, or not all of it.
    """
    folder = Path(path).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file():
        near = near_names(folder)
        if (folder / "adapter" / "adapter_config.json").is_file():
            near = f"; that is a run, its adapter is {folder / 'adapter'}"
        raise ConfigError([("adapter", f"no adapter in {path}: no adapter_config.json{near}")])
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        read["peft_type"], read["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([("adapter", f"{file} cannot be read: {error!r}")]) from error
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigError([("adapter", f"{path} has no weights: neither {' nor '.join(WEIGHTS)}")])
    config: dict[str, Any] = read
    return config


def check_base(key: str, path: str, revision: str | None) -> None:
    """Compare the base that an adapter's own run loaded, where the record lies beside it.

    Raises:
        ConfigError: it was another one, whatever its folder is called.
    """
    record = Path(path).expanduser().parent / "run.json"
    if not record.is_file():
        return
    try:
        known = json.loads(record.read_text(encoding="utf-8")).get("base")
    except (OSError, ValueError):
        return
    if comparable(known, revision) and known != revision:
        text = f"{path} was trained on a base of other weights ({known}, not {revision})"
        raise ConfigError([(key, text)])


def started(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a config whose `peft` section is that of the adapter it starts from.

    Raises:
        ConfigError: the adapter is of another method, base or task, or was overridden.
    """
    path = values["adapter"]
    if path is None:
        return values
    peft = values["peft"]
    if not isinstance(path, str):
        raise ConfigError([("adapter", f"{path!r} is no folder")])
    found = adapter_config(path)
    faults = list(_unlike(path, found, values))
    if faults:
        raise ConfigError(faults)
    overridden = {parted(override)[0] for override in overrides}
    own = {key: found[key] for key in peft if key in found and key not in RUNTIME}
    own |= {key: found[key] for key in ("target_modules",) if key in peft}
    if "init_lora_weights" in peft:
        own["init_lora_weights"] = True  # it begins as saved, which is plain LoRA also for PiSSA
    for key in peft:
        if f"peft.{key}" in overridden and key in own and peft[key] != own[key]:
            text = f"{peft[key]!r}, but the adapter that the run starts from has {own[key]!r}"
            faults.append((f"peft.{key}", f"{text}; leave it out"))
    if faults:
        raise ConfigError(faults)
    return values | {"peft": peft | own}


def _unlike(
    path: str, found: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterable[tuple[str, str]]:
    """Say where an adapter cannot be what the config asks for."""
    kind, peft = str(found["peft_type"]), values["peft"]
    if peft is None:
        yield "adapter", "peft=none trains every weight and no adapter; choose its method"
        return
    wanted = CLASSES.get(kind, kind.replace("_", "") + "config").lower()
    if peft["_target_"].rpartition(".")[2].lower() != wanted.lower():
        yield "peft", f"{path} is {kind}; peft={KINDS.get(kind, kind.lower())}"
    if bool(found.get("use_dora")) != bool(peft.get("use_dora")):
        yield "peft", f"{path} is {'DoRA; peft=dora' if found.get('use_dora') else 'no DoRA'}"
    base, model = str(found["base_model_name_or_path"]), str(values["model"]["path"])
    if named(base) != named(model):
        yield "adapter", f"{path} was trained on {base}, not on {model}"
    task, own = found.get("task_type"), values["algorithm"]["task_type"]
    if task not in (own, None) and (task, own) != ("CAUSAL_LM", "SEQ_CLS"):
        yield "adapter", f"{path} was trained for {task}; this algorithm trains for {own}"
