"""Every fault of a config at once, in about a second and without importing torch.

Knows arguments, ranges and pairs that do not work; what only the loaded base can tell (module
names) is checked in `adapter.py`.
"""

from __future__ import annotations

import ast
import glob
import json
import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from lora_exp.config import asset, plain, targets, untrusted
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.redaction import redact
from lora_exp.signature import fits, signature

Fault = tuple[str, str]

# method -> quantisation -> why the pair is refused; seen by running them
FLOAT_BASE = "takes its start from the base's float weights and rewrites them; quant=none"
REFUSED: dict[str, dict[str, str]] = {
    "dora": {"int8": "bitsandbytes drops the scale that the weight's norm needs; quant=nf4"},
    "pissa": dict.fromkeys(("nf4", "fp4", "int8"), FLOAT_BASE),
    "olora": dict.fromkeys(("nf4", "fp4", "int8"), FLOAT_BASE),
}


def validate(cfg: DictConfig) -> DictConfig:
    """Return a settled config unchanged, or say all that is wrong with it.

    Raises:
        ConfigError: one `(key, text)` for each fault.
    """
    values = plain(cfg)
    faults = [*untrusted(cfg), *_arguments(values), *_ranges(cfg), *_pairs(cfg), *_files(cfg)]
    faults += _secrets(values, redact(values))
    if faults:
        raise ConfigError(faults)
    return cfg


def _arguments(values: dict[str, Any]) -> Iterator[Fault]:
    """Compare each node with its target's signature."""
    for key, target in targets(values):
        if not isinstance(target, str):
            yield f"{key}._target_", f"{target!r} is not a dotted name"
            continue
        node = _select(values, key)
        given = {f"{key}.{k}": v for k, v in node.items() if not k.startswith("_")}
        if key == "algorithm.args":
            twice = sorted(node.keys() & values["train"].keys())
            yield from ((f"{key}.{k}", f"is also train.{k}; keep one of them") for k in twice)
            given |= {f"train.{k}": v for k, v in values["train"].items()}
        yield from _against(target, key, given)


def _against(target: str, key: str, given: dict[str, Any]) -> Iterator[Fault]:
    found = signature(target)
    if found is None:
        yield f"{key}._target_", f"no class or function is called {target}"
        return
    if found.open:
        text = f"{target} takes any argument, so a misspelt one would vanish; wrap it in a function"
        yield f"{key}._target_", text
    for full, value in given.items():
        name = full.rpartition(".")[2]
        if name not in found.arguments:
            near = did_you_mean(name, found.arguments)
            yield full, f"{target} has no such argument{near}"
        elif value is not None and not fits(value, found.arguments[name]):
            annotation = found.arguments[name]
            wanted = ast.unparse(annotation) if annotation else ""
            yield full, f"{value!r} is not {wanted}"


def _ranges(cfg: DictConfig) -> Iterator[Fault]:
    train, peft = cfg.train, cfg.peft or {}
    for name in ("r", "init_r", "target_r", "num_virtual_tokens"):
        least = 0 if name == "r" and "oft_block_size" in peft else 1
        if name in peft and _is_number(peft[name]) and peft[name] < least:
            yield f"peft.{name}", f"{peft[name]} is no rank; give {least} or more"
    alpha = peft.get("lora_alpha", 1)
    if _is_number(alpha) and not 0 < alpha < math.inf:
        yield "peft.lora_alpha", f"{alpha} scales the adapter away; give a number above 0"
    for name in (name for name in peft if name.endswith("dropout")):
        if _is_number(peft[name]) and not 0 <= peft[name] < 1:
            yield f"peft.{name}", f"{peft[name]} is no share; give 0 or more and below 1"
    if _is_number(train.learning_rate) and not 0 < train.learning_rate < math.inf:
        text = f"{train.learning_rate} trains nothing; give a rate above 0 (LoRA 1e-4 to 5e-4)"
        yield "train.learning_rate", text
    if _is_number(train.max_steps) and train.max_steps != -1 and train.max_steps < 1:
        yield (
            "train.max_steps",
            f"{train.max_steps} trains nothing; give 1 or more, or -1 for epochs",
        )
    if train.max_steps == -1 and not 0 < _number(train.num_train_epochs) < math.inf:
        yield "train.num_train_epochs", f"{train.num_train_epochs} trains nothing; give above 0"
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if _number(train[name]) < 1:
            yield f"train.{name}", f"{train[name]} is below 1"
    for name, least in (("rows", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if _number(cfg.samples[name], -1) < least:
            yield f"samples.{name}", f"{cfg.samples[name]!r} is not {least} or more"
    for name in ("max_rows", "max_eval_rows", "rows", "eval_rows"):
        if name in cfg.data and cfg.data[name] is not None and _number(cfg.data[name]) < 1:
            yield f"data.{name}", f"{cfg.data[name]!r} is not 1 or more; null takes all"
    if "eval_share" in cfg.data and not 0 <= _number(cfg.data.eval_share, -1) < 1:
        yield "data.eval_share", f"{cfg.data.eval_share!r} is no share; give 0 or more and below 1"
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        yield "seed", f"{cfg.seed!r} is no seed; give a whole number from 0"
    if not 0 < len(str(cfg.name)) <= 128 or "/" in str(cfg.name) or str(cfg.name).startswith("."):
        yield "name", "give 1 to 128 characters, no slash, no leading dot: it is not a path"


def _pairs(cfg: DictConfig) -> Iterator[Fault]:
    method, quant = cfg.choices.get("peft", "none"), cfg.choices.get("quant", "none")
    if cfg.quant is not None and cfg.peft is None:
        yield "peft", f"none trains every weight, but {quant} weights cannot be trained; quant=none"
    if cfg.quant is not None and cfg.model.random_weights:
        yield "model.random_weights", f"untrained weights cannot be loaded as {quant}; quant=none"
    if cfg.quant is not None and quant in REFUSED.get(method, {}):
        yield "peft", f"{method} on {quant}: {REFUSED[method][quant]}"
    if method == "prefix_tuning" and cfg.train.gradient_checkpointing:
        yield "train.gradient_checkpointing", "prefix_tuning's keys do not survive it; give false"


def _files(cfg: DictConfig) -> Iterator[Fault]:
    """Check what lies on this machine; what lies on a hub is checked when it is loaded."""
    path = str(cfg.model.path)
    folder = asset(path)
    if path.startswith(("/", ".", "~", "pkg://")) and not folder.exists():
        yield "model.path", f"no such folder: {path}"
    if folder.is_dir() and cfg.model.gguf_file and not (folder / cfg.model.gguf_file).is_file():
        near = did_you_mean(cfg.model.gguf_file, (p.name for p in folder.glob("*.gguf")))
        yield "model.gguf_file", f"no such file in {path}{near}"
    length = cfg.algorithm.args.get("max_length")
    if length is not None and _number(length) < 1:
        yield "algorithm.args.max_length", f"{length!r} is not 1 or more"
    elif length is not None and (folder / "config.json").is_file():
        context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        if context and length > context:
            text = f"{length} is longer than the model's context of {context} tokens"
            yield "algorithm.args.max_length", text
    if cfg.data.get("_target_") == "lora_exp.data.jsonl":
        for key in ("path", "eval_path"):
            name = cfg.data[key]
            if name is not None and not glob.glob(str(asset(name)), recursive=True):  # noqa: PTH207
                folder = asset(name).parent
                near = did_you_mean(asset(name).name, (p.name for p in folder.glob("*")))
                yield f"data.{key}", f"no file matches {name}{near}"


def _secrets(values: Any, clean: Any, key: str = "") -> Iterator[Fault]:
    """Refuse secrets: trainers pickle their arguments beside every checkpoint."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _secrets(value, clean[name], f"{key}.{name}".lstrip("."))
    elif values != clean:
        yield key, "is a secret, and configs are saved; export it instead (HF_TOKEN, WANDB_API_KEY)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, otherwise: float = 0) -> float:
    return value if _is_number(value) and not math.isnan(value) else otherwise


def _select(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
