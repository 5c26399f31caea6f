"""Every fault of a config at once, in about a second and without importing torch.

Knows arguments and files, and asks `ranges` and `pairs`; what only the loaded base can tell (module
names) is checked when the adapter is attached.
"""

from __future__ import annotations

import ast
import glob
import json
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lora_exp.config.arguments import arguments
from lora_exp.config.door import every_target, is_trusted, plain, untrusted
from lora_exp.config.learning import learning
from lora_exp.config.owned import OWNED, OWNED_IN_TRACKING, owned
from lora_exp.config.pairs import pairs
from lora_exp.config.ranges import Fault, is_number, ranges
from lora_exp.config.settled import settle
from lora_exp.config.signature import compared, fits, signature
from lora_exp.config.start import adapter_config
from lora_exp.config.sweeping import sweeping
from lora_exp.config.words import key_hint
from lora_exp.data.shapes import SHAPES
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.files.paths import asset, is_path, near_names
from lora_exp.files.redaction import redact
from lora_exp.files.revision import is_commit

TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM")
SECTIONS = (
    "model", "algorithm", "algorithm.args", "algorithm.trainer", "data", "train", "samples",
    "lockstep",
)  # fmt: skip
KEYS = {
    "": (
        "name", "seed", "resume", "retry_failed", "strict", "adapter", "objective", "goal", "keep",
        "trusted_targets", "train", "rate", "samples", "model", "quant", "peft", "targets",
        "algorithm", "data", "tracking", "lockstep", "choices",
    ),
    "rate": ("peft", "model"),
    "samples": ("rows", "max_new_tokens", "batch_size"),
    "lockstep": ("max_jobs", "mode", "verify", "on_difference"),
    "algorithm": (
        "learning_rate", "task_type", "shape", "objective", "goal", "metrics", "rewards",
        "trainer", "args",
    ),
}  # fmt: skip
LISTS = ("trusted_targets", "algorithm.metrics", "tracking.tags")
NULLS = ("train.bf16", "peft.rank_pattern", "peft.alpha_pattern")  # null: decided when it runs


def settled(cfg: DictConfig, about: DictConfig, master: DictConfig | None = None) -> DictConfig:
    """Return the settled config of a job that Hydra composed, or say all that is wrong with it.

    Args:
        cfg: the job's, without Hydra's own section.
        about: that section.
        master: that section of the whole sweep, in a sweep.

    Raises:
        ConfigError: every fault of the config at once.
    """
    choices = OmegaConf.to_container(about.runtime.choices)
    common = list(about.job.config.override_dirname.exclude_keys)  # a sweep's launcher knows them
    overrides = list(about.overrides.task)
    ready = validate(settle(cfg, choices, overrides, common))  # type: ignore[arg-type]
    if faults := list(sweeping(about, master, ready.goal)):
        raise ConfigError(faults)
    return ready


def validate(cfg: DictConfig) -> DictConfig:
    """Return a settled config unchanged, or say all that is wrong with it.

    Raises:
        ConfigError: one `(key, text)` for each fault.
    """
    values = plain(cfg)
    faults = list(_shape(cfg))
    if not faults:
        faults = [*untrusted(cfg), *_keys(cfg), *_arguments(values)]
        faults += [*ranges(cfg), *learning(cfg), *arguments(cfg), *_algorithm(cfg)]
        faults += [*pairs(cfg), *_files(cfg)]
        faults += _secrets(values, redact(values))
    if faults:
        raise ConfigError(faults)
    return cfg


def _shape(cfg: DictConfig) -> Iterator[Fault]:
    """Check that there is something to check."""
    for key in LISTS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, ListConfig):
            yield key, f"is a list; give {key}=[...]"
    for key in SECTIONS:
        if not isinstance(OmegaConf.select(cfg, key), DictConfig):
            yield key, "is not a section; choose an option of its group, or leave it"
            return
    for key in ("model", "quant", "peft", "data", "tracking"):
        node = cfg[key]
        if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
            text = f"is no option of conf/{key} (null is {key}=none); a preset may have set values"
            yield key, f"{text} that the option {cfg.choices.get(key)} does not take"


def _keys(cfg: DictConfig) -> Iterator[Fault]:
    """Refuse keys that nothing reads; those of targets are held against their signatures."""
    for section, known in KEYS.items():
        for key in map(str, OmegaConf.select(cfg, section) if section else cfg):
            if key not in known:
                full = f"{section}.{key}".lstrip(".")
                hint = key_hint(full)
                near = f"; give {hint}" if hint else did_you_mean(key, known)
                yield full, f"nothing reads this key{near}"


def _arguments(values: dict[str, Any]) -> Iterator[Fault]:
    """Compare each node with its target's signature."""
    for key, target in every_target(values):
        if not isinstance(target, str):
            yield f"{key}._target_", f"{target!r} is not a dotted name"
            continue
        node = _select(values, key)
        given = {f"{key}.{k}": v for k, v in node.items() if not k.startswith("_")}
        if key == "tracking":
            own = [name for name in given if name.rpartition(".")[2] in OWNED_IN_TRACKING]
            yield from ((name, "belongs to the run; leave it out") for name in own)
        if key == "algorithm.args":
            twice = sorted(node.keys() & values["train"].keys())
            yield from ((f"{key}.{k}", f"is also train.{k}; keep one of them") for k in twice)
            given |= {f"train.{k}": v for k, v in values["train"].items()}
            yield from owned(target, given)
            given = {k: v for k, v in given.items() if k.rpartition(".")[2] not in OWNED}
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
            hint = key_hint(full) or ""
            other = hint.startswith("peft.") and hint[5:].rstrip("=.") not in found.arguments
            near = f"; give {hint}" if hint and not other else did_you_mean(name, found.arguments)
            yield full, f"{target} has no such argument{near}"
        elif (value is not None or full not in NULLS) and not fits(value, found.arguments[name]):
            yield full, f"{value!r} {_not(value, found.arguments[name])}"


def _not(value: Any, annotation: ast.expr | None) -> str:
    """Say what an annotation would have taken."""
    wanted = ast.unparse(annotation) if annotation else ""
    if wanted.startswith("Literal["):
        options = [str(o) for o in ast.literal_eval(wanted.removeprefix("Literal"))]
        return f"is none of {', '.join(options)}{did_you_mean(str(value), options)}"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return f"is not {words.get(wanted, wanted)}"


def _algorithm(cfg: DictConfig) -> Iterator[Fault]:
    """Check what an algorithm says of its rows and rewards."""
    node = cfg.algorithm
    if node.shape not in SHAPES:
        yield "algorithm.shape", f"{node.shape!r} is none of {', '.join(SHAPES)}"
    if node.task_type not in TASKS:
        yield "algorithm.task_type", f"{node.task_type!r} is none of {', '.join(TASKS)}"
    if "rewards" in node:
        yield from _rewards(cfg)
    asked = node.args.get("loss_type") or []
    losses = compared(str(node.trainer.get("_target_")), "loss_type") if asked else ()
    for loss in asked if isinstance(asked, ListConfig) else [asked]:
        if losses and loss not in losses:
            near = did_you_mean(str(loss), losses)
            text = f"{loss!r} is none of {', '.join(sorted(losses))}{near}"
            yield "algorithm.args.loss_type", text


def _rewards(cfg: DictConfig) -> Iterator[Fault]:
    named = cfg.algorithm.rewards
    if not isinstance(named, ListConfig) or not named:
        text = "name at least one: algorithm.rewards=[lora_exp.rewards.exact_match], or a reward"
        yield "algorithm.rewards", f"{text} adapter's folder"
        return
    known = signature(cfg.algorithm.trainer._target_)
    if known is not None and "reward_funcs" not in known.arguments:
        yield "algorithm.rewards", f"{cfg.algorithm.trainer._target_} takes no rewards"
    for i, name in enumerate(named):
        key = f"algorithm.rewards.{i}"
        if isinstance(name, str) and is_path(name):
            try:
                adapter_config(name)
            except ConfigError as error:
                yield key, error.faults[0][1]
        elif isinstance(name, str):
            if is_trusted(name, cfg.trusted_targets) and signature(name) is None:
                yield key, f"no function is called {name}"
        elif not isinstance(name, DictConfig) or "_target_" not in name:
            yield key, "is no dotted name, no folder and nothing with a _target_"
    weights = cfg.algorithm.args.get("reward_weights")
    if weights is not None and (not isinstance(weights, ListConfig) or len(weights) != len(named)):
        count = len(weights) if isinstance(weights, ListConfig) else 1
        text = f"{count} weights for {len(named)} rewards; a list has one for each"
        yield "algorithm.args.reward_weights", text


def _files(cfg: DictConfig) -> Iterator[Fault]:
    """Check what lies on this machine; what lies on a hub is checked when it is loaded."""
    yield from _model_files(cfg)
    if cfg.strict:
        yield from _unpinned(cfg)
    if cfg.data._target_ != "lora_exp.data.rows.jsonl":
        return
    for key in ("path", "eval_path", "chat_template"):
        name = cfg.data[key]
        if not isinstance(name, str):
            continue  # null, or a fault already
        try:
            path = asset(name)
        except ConfigError as error:
            yield f"data.{key}", error.faults[0][1]
            continue
        if not glob.glob(str(path), recursive=True):  # noqa: PTH207
            near = near_names(path)
            yield f"data.{key}", f"no file matches {name}{near}"


def _unpinned(cfg: DictConfig) -> Iterator[Fault]:
    """Refuse what may be something else tomorrow; local files are known by their hashes."""
    for key in ("model", "data"):
        node = cfg[key]
        hub = key == "model" or node._target_ == "lora_exp.data.rows.hub"
        if hub and not asset(str(node.path)).exists() and not is_commit(node.revision):
            text = f"strict=true: pin {node.path} to a commit, its 40 hexadecimal digits"
            yield f"{key}.revision", text


def _model_files(cfg: DictConfig) -> Iterator[Fault]:
    path, gguf_file = str(cfg.model.path), cfg.model.gguf_file
    try:
        folder = asset(path)
    except ConfigError as error:
        yield "model.path", error.faults[0][1]
        return
    if path.startswith(("/", ".", "~", "pkg://")) and not folder.exists():
        yield "model.path", f"no such folder: {path}"
    if isinstance(gguf_file, str) and folder.is_dir() and not (folder / gguf_file).is_file():
        near = near_names(folder / gguf_file, "*.gguf")
        yield "model.gguf_file", f"no such file in {path}{near}"
    args = cfg.algorithm.args
    length = args.get("max_length")
    if is_number(length) and length < 1:
        yield "algorithm.args.max_length", f"{length!r} is not 1 or more"
    elif is_number(length) and (folder / "config.json").is_file():
        context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        if context and length > context:
            text = f"{length} is longer than the model's context of {context} tokens"
            yield "algorithm.args.max_length", text
    if args.get("packing") and length is None:
        yield "algorithm.args.max_length", "packing fills sequences of this length; give a number"


def _secrets(values: Any, clean: Any, key: str = "") -> Iterator[Fault]:
    """Refuse secrets: trainers pickle their arguments beside every checkpoint."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _secrets(value, clean[name], f"{key}.{name}".lstrip("."))
    elif values != clean:
        yield key, "is a secret, and configs are saved; export it instead (HF_TOKEN, WANDB_API_KEY)"


def _select(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
