"""The base of what was saved: its name, and a config that loads it; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.after.saved import Saved
from lora_exp.config.composition import compose
from lora_exp.config.door import CONF
from lora_exp.config.pairs import QUANTISATIONS
from lora_exp.config.validation import TASKS
from lora_exp.errors import SavedError
from lora_exp.files.revision import is_commit

# what a run's config may call to quantise its base: only settings are taken from it, no other code
QUANT_TARGETS = ("lora_exp.model.loading.bnb_4bit", "lora_exp.model.loading.bnb_8bit")
# a run's tools load its base by the same keys, except those that only the command line may set
NOT_TAKEN = ("_target_", "trust_remote_code", "attn_implementation")
# transformers would download code for other names, and a run's config may come from anybody
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def parse_base(base: str) -> tuple[str, str]:
    """Return the name and the location of a base, given as `NAME=PLACE`; else both are `base`."""
    name, _, location = base.partition("=")
    return (name, location) if location and not Path(base).exists() else (base, base)


def base_config(saved: Saved, base: str | None = None, quant: str | None = None) -> DictConfig:
    """Return a config that loads the base of what was saved.

    Args:
        saved: an adapter, or a whole model.
        base: another location of the same base: an option of conf/model, a folder or a hub id;
            `NAME=PLACE` if the base has another name there.
        quant: an option of conf/quant; None: as in its run, or unquantised without a run.

    Raises:
        SavedError: it names no base, its config would run other code than ours, or it was trained
            for a task that lora-exp does not have.
        ConfigError: there is no such option.
    """
    base = base and parse_base(base)[1]
    location = base or saved.base
    if not location:
        raise SavedError(f"{saved.folder} names no base; give --base")
    if (Path(location).expanduser() / "adapter_config.json").is_file():
        raise SavedError(f"{location} is an adapter, not a base")
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
    option = location if is_option else "local"
    path = [] if is_option else ["model.path=here"]  # replaced below
    quantisation = quant or (saved.quant if saved.quant in QUANTISATIONS else "none")
    cfg = compose("tracking=none", f"model={option}", *path, f"quant={quantisation}")
    values: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    if not is_option:
        values["model"]["path"] = location
    keys = values["model"].keys() - set(NOT_TAKEN)
    values["model"]["attn_implementation"] = _attention(saved)
    if base is None and saved.adapter is not None:
        run_model = _run_section(saved, "model", ("lora_exp.model.loading.load",))
        values["model"] |= {key: run_model[key] for key in keys if key in run_model}
        if is_commit(recorded := saved.record.get("base")):
            values["model"]["revision"] = recorded
    if quant is None and saved.adapter is not None:
        values["quant"] = _run_section(saved, "quant", QUANT_TARGETS) or values["quant"]
    elif "experts" in (values["quant"] or {}) and (saved.adapter or {}).get("target_parameters"):
        values["quant"]["experts"] = False  # peft adapts them in floats only
    values["algorithm"]["task_type"] = saved.task_type
    return OmegaConf.create(values)


def _attention(saved: Saved) -> str:
    """Return the attention that the run computed with; `auto` where none is known."""
    node = saved.settings.get("model")
    configured = node.get("attn_implementation") if isinstance(node, dict) else None
    attention = saved.record.get("attention", configured)
    return attention if attention in ATTENTION else "auto"


def _run_section(saved: Saved, key: str, targets: tuple[str, ...]) -> dict[str, Any]:
    """Return a section of a run's config, if it holds only settings of one of the targets.

    Raises:
        SavedError: it would call other code; the config may come from anybody.
    """
    node = saved.settings.get(key) or {}
    target = node.get("_target_") if isinstance(node, dict) else node
    values = node.values() if isinstance(node, dict) else [node]
    items = [item for v in values for item in (v if isinstance(v, list) else [v])]
    if node and (target not in targets or any(isinstance(item, dict | list) for item in items)):
        cure = "give --base" if key == "model" else "give --quant"
        text = f"{key} is {target!r}, which may call other code than lora-exp's"
        raise SavedError(f"{saved.run}/config.yaml: {text}; {cure}")
    return dict(node)
