"""The adapter that a run starts from: its config and its base. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.overrides import split_override
from lora_exp.errors import ConfigError
from lora_exp.files.paths import near_names
from lora_exp.files.revision import comparable, named

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# peft_type -> its config class, where the class is not named like the type
CLASSES = {"P_TUNING": "PromptEncoderConfig"}
METHODS = {"LORA": "lora", "P_TUNING": "p_tuning"}  # peft_type -> option of conf/peft
# keys that a run does not take from the adapter
RUNTIME = ("_target_", "target_modules", "init_lora_weights", "feedforward_modules")


def adapter_config(path: str) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        ConfigError: there is no adapter in the folder, or it is incomplete.
    """
    folder = Path(path).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file():
        near = near_names(folder)
        if (folder / "adapter" / "adapter_config.json").is_file():
            near = f"; that is a run, its adapter is {folder / 'adapter'}"
        raise ConfigError([("adapter", f"no adapter in {path}: no adapter_config.json{near}")])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["peft_type"], content["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([("adapter", f"{file} cannot be read: {error!r}")]) from error
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigError([("adapter", f"{path} has no weights: neither {' nor '.join(WEIGHTS)}")])
    config: dict[str, Any] = content
    return config


def check_start_base(
    key: str,
    path: str,
    revision: str | None,
    saved_as: str | None = None,
    consent: bool = False,
) -> None:
    """Compare a base with the one that an adapter was trained on, if its run's record is there.

    Args:
        key: of the config, for errors.
        path: the adapter.
        revision: the base's commit or hash.
        saved_as: how the base was saved quantised.
        consent: whether a quantised base and its original, whose files differ, count as the same.

    Raises:
        ConfigError: the bases differ, even if their folders have the same name.
    """
    record = Path(path).expanduser().parent / "run.json"
    if not record.is_file():
        return
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    trained_on = values.get("base")
    if consent and saved_as != values.get("saved_as"):
        return
    if comparable(trained_on, revision) and trained_on != revision:
        text = f"{path} was trained on a base of other weights ({trained_on}, not {revision})"
        raise ConfigError([(key, text)])


def with_start_adapter(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a config whose `peft` section is that of the adapter that the run starts from.

    Raises:
        ConfigError: the adapter has another method, base or task, or an override contradicts it.
    """
    path = values["adapter"]
    if path is None:
        return values
    peft = values["peft"]
    if not isinstance(path, str):
        raise ConfigError([("adapter", f"{path!r} is no folder")])
    config = adapter_config(path)
    faults = list(_differences(path, config, values))
    if faults:
        raise ConfigError(faults)
    overridden = {split_override(override)[0] for override in overrides}
    saved = {key: config[key] for key in peft if key in config and key not in RUNTIME}
    saved |= {key: config[key] for key in ("target_modules",) if key in peft}
    if "init_lora_weights" in peft:
        saved["init_lora_weights"] = True  # it is saved as plain LoRA, also for PiSSA
    for key in peft:
        if f"peft.{key}" in overridden and key in saved and peft[key] != saved[key]:
            text = f"{peft[key]!r}, but the adapter that the run starts from has {saved[key]!r}"
            faults.append((f"peft.{key}", f"{text}; leave it out"))
    if faults:
        raise ConfigError(faults)
    return values | {"peft": peft | saved}


def _differences(
    path: str, config: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterable[tuple[str, str]]:
    """Yield a fault for each difference between an adapter and the config."""
    peft_type, peft = str(config["peft_type"]), values["peft"]
    if peft is None:
        yield "adapter", "peft=none trains every weight and no adapter; choose its method"
        return
    class_name = CLASSES.get(peft_type, peft_type.replace("_", "") + "config").lower()
    if peft["_target_"].rpartition(".")[2].lower() != class_name.lower():
        yield "peft", f"{path} is {peft_type}; peft={METHODS.get(peft_type, peft_type.lower())}"
    if bool(config.get("use_dora")) != bool(peft.get("use_dora")):
        yield "peft", f"{path} is {'DoRA; peft=dora' if config.get('use_dora') else 'no DoRA'}"
    base, model = str(config["base_model_name_or_path"]), str(values["model"]["path"])
    consent = values["adapter_base"]
    if consent is not None and named(consent) != named(base):
        yield "adapter_base", f"{consent}, but {path} was trained on {base}"
    elif consent is None and named(base) != named(model):
        text = f"{path} was trained on {base}, not on {model}"
        yield "adapter", f"{text}; if they are the same, give adapter_base={named(base)}"
    task, required = config.get("task_type"), values["algorithm"]["task_type"]
    if task not in (required, None) and (task, required) != ("CAUSAL_LM", "SEQ_CLS"):
        yield "adapter", f"{path} was trained for {task}; this algorithm trains for {required}"
