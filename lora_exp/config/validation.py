"""Finds all faults of a config at once, in about a second and without importing torch.

Checks arguments and files, and calls the other checks of this room; what needs the loaded base
(module names) is checked when the adapter is attached.
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.arguments import argument_faults
from lora_exp.config.door import (
    Section,
    every_target,
    hidden,
    is_trusted,
    plain,
    sections,
    selected,
    untrusted,
)
from lora_exp.config.frozen import frozen
from lora_exp.config.learning import learning_faults
from lora_exp.config.named_files import named_file_faults
from lora_exp.config.owned import OWNED, OWNED_IN_TRACKING, owned_faults
from lora_exp.config.pairs import pair_faults
from lora_exp.config.processes import process_faults
from lora_exp.config.ranges import Fault, range_faults
from lora_exp.config.settled import Resolved, completed, resolved, settled_values
from lora_exp.config.sharding import sharding_faults
from lora_exp.config.signature import fits, signature, texts_compared_with
from lora_exp.config.start import adapter_config
from lora_exp.config.stopping import stopping_faults
from lora_exp.config.sweeping import sweep_faults
from lora_exp.config.trackers import is_tracker, tracker_keys, tracking_faults
from lora_exp.config.words import key_hint
from lora_exp.data.shapes import SHAPES
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.files.paths import is_path
from lora_exp.files.redaction import secret_keys

TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM")
SECTIONS = (
    "model", "algorithm", "algorithm.args", "algorithm.trainer", "data", "train", "samples",
    "lockstep",
)  # fmt: skip
KEYS = {
    "": (
        "name", "sweep_name", "seed", "deterministic", "batch_invariant", "resume", "retry_failed",
        "report", "strict", "host", "adapter", "adapter_base", "objective", "goal", "keep",
        "trusted_targets", "train", "rate", "samples", "model", "quant", "peft", "targets",
        "algorithm", "data", "tracking", "early_stopping", "parallel", "lockstep", "choices",
    ),
    "rate": ("peft", "model"),
    "samples": ("rows", "max_new_tokens", "batch_size"),
    "lockstep": ("max_jobs", "mode", "verify", "on_difference"),
    "parallel": ("processes", "nodes", "sharding"),
    "algorithm": (
        "learning_rate", "task_type", "shape", "objective", "goal", "metrics", "rewards",
        "trainer", "args",
    ),
}  # fmt: skip
LISTS = ("trusted_targets", "algorithm.metrics", "algorithm.rewards", "tracking.tags")
NULLS = ("train.bf16", "peft.rank_pattern", "peft.alpha_pattern")  # null: the run decides


def job_config(cfg: DictConfig, hydra: DictConfig, master: DictConfig | None = None) -> DictConfig:
    """Return the settled and validated config of a job that Hydra composed.

    Args:
        cfg: the job's config; the `hydra` section in it is left out.
        hydra: the `hydra` section.
        master: that section of the whole sweep, in a sweep.

    Raises:
        ConfigError: the config has faults (all are listed).
    """
    values = completed(resolved_job(cfg, hydra), list(hydra.overrides.task), keys_in_common(hydra))
    check(values)
    if faults := list(sweep_faults(hydra, master, sections(values))):
        raise ConfigError(faults)
    return frozen(values)


def resolved_job(cfg: DictConfig, hydra: DictConfig) -> Resolved:
    """Return the plain values of a job that Hydra composed; see `job_config`."""
    choices: Any = OmegaConf.to_container(hydra.runtime.choices)
    with hidden(cfg, "hydra") as own:
        return resolved(own, choices, list(hydra.overrides.task))


def keys_in_common(hydra: DictConfig) -> list[str] | None:
    """Return the keys that all jobs of a sweep share, as its launcher has set them; else None."""
    if hydra.mode != RunMode.MULTIRUN:
        return None
    return list(hydra.job.config.override_dirname.exclude_keys)


def settle(cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]) -> DictConfig:
    """Return the settled and validated config of a run; see `settled_values` and `check`."""
    values = settled_values(cfg, choices, overrides)
    check(values)
    return frozen(values)


def validate(cfg: DictConfig) -> DictConfig:
    """Return a settled config unchanged if it has no faults; see `check`."""
    check(plain(cfg))
    return cfg


def check(values: dict[str, Any]) -> None:
    """Check a settled config's values.

    Raises:
        ConfigError: one `(key, text)` for each fault.
    """
    cfg = sections(values)
    faults = list(_shape(cfg))
    if not faults:
        faults = [*untrusted(values), *_keys(cfg), *_arguments(values)]
        faults += [*range_faults(cfg), *learning_faults(cfg), *argument_faults(cfg)]
        faults += [*_algorithm(cfg), *pair_faults(cfg), *stopping_faults(cfg)]
        faults += [*process_faults(cfg), *sharding_faults(cfg)]
        faults += [*named_file_faults(cfg), *tracking_faults(cfg)]
        faults += _secrets(values)
    if faults:
        raise ConfigError(faults)


def _shape(cfg: Section) -> Iterator[Fault]:
    """Check that sections and lists exist, as the other checks require."""
    for key in LISTS:
        value = selected(cfg, key)
        if value is not None and not isinstance(value, list):
            yield key, f"is a list; give {key}=[...]"
    if selected(cfg, "algorithm.metrics") == []:
        yield "algorithm.metrics", "name at least one, such as loss"
    for key in SECTIONS:
        if not isinstance(selected(cfg, key), Section):
            yield key, "is not a section; choose an option of its group, or leave it as it is"
            return
    if not isinstance(cfg.get("parallel"), Section | None):  # None: of an earlier version
        yield "parallel", "is no option of conf/parallel; give parallel=none or parallel=ddp"
    for key in ("model", "quant", "peft", "data", "tracking", "early_stopping"):
        node = cfg[key]
        if key == "tracking" and isinstance(node, Section) and tracker_keys(node):
            continue
        if node is not None and not (isinstance(node, Section) and "_target_" in node):
            text = f"is no option of conf/{key} (null is {key}=none); a preset may have set values"
            yield key, f"{text} that the option {cfg.choices.get(key)} does not take"


def _keys(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each key that nothing reads; `_arguments` checks those of targets."""
    for section, readable in KEYS.items():
        for key in map(str, (selected(cfg, section) if section else cfg) or ()):
            if key not in readable:
                full_key = f"{section}.{key}".lstrip(".")
                hint = key_hint(full_key)
                near = f"; give {hint}" if hint else did_you_mean(key, readable)
                yield full_key, f"nothing reads this key{near}"


def _arguments(values: dict[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each argument that does not fit its target's signature."""
    for key, target in every_target(values):
        if not isinstance(target, str):
            yield f"{key}._target_", f"{target!r} is not a dotted name"
            continue
        node = selected(values, key)
        arguments = {f"{key}.{k}": v for k, v in node.items() if not k.startswith("_")}
        if key.partition(".")[0] == "tracking":
            arguments = {k: v for k, v in arguments.items() if not is_tracker(v)}
            set_by_run = (k for k in arguments if k.rpartition(".")[2] in OWNED_IN_TRACKING)
            yield from ((k, "belongs to the run; leave it out") for k in set_by_run)
        if key == "algorithm.args":
            duplicates = sorted(node.keys() & values["train"].keys())
            yield from ((f"{key}.{k}", f"is also train.{k}; keep one of them") for k in duplicates)
            arguments |= {f"train.{k}": v for k, v in values["train"].items()}
            yield from owned_faults(target, arguments)
            arguments = {k: v for k, v in arguments.items() if k.rpartition(".")[2] not in OWNED}
        yield from _unfit(target, key, pickle.dumps(arguments))


@lru_cache(maxsize=256)
def _unfit(target: str, key: str, pickled: bytes) -> tuple[Fault, ...]:
    """Return a fault for each argument that does not fit its target's signature.

    The jobs of a sweep have most of them in common, and pickled they can be looked up.
    """
    target_signature = signature(target)
    if target_signature is None:
        return ((f"{key}._target_", f"no class or function is called {target}"),)
    faults: list[Fault] = []
    if target_signature.open:
        text = f"{target} takes any argument, so a misspelt one would go unnoticed"
        faults.append((f"{key}._target_", f"{text}; wrap it in a function"))
    arguments, accepted = pickle.loads(pickled), target_signature.arguments
    for full_key, value in arguments.items():
        name = full_key.rpartition(".")[2]
        if name not in accepted:
            hint = key_hint(full_key) or ""
            of_other_method = hint.startswith("peft.") and hint[5:].rstrip("=.") not in accepted
            use_hint = hint and not of_other_method
            near = f"; give {hint}" if use_hint else did_you_mean(name, accepted)
            faults.append((full_key, f"{target} has no such argument{near}"))
        elif (value is not None or full_key not in NULLS) and not fits(value, accepted[name]):
            faults.append((full_key, f"{value!r} {_type_text(value, accepted[name])}"))
    return tuple(faults)


def _type_text(value: Any, annotation: ast.expr | None) -> str:
    """Return why a value does not fit an annotation."""
    type_name = ast.unparse(annotation) if annotation else ""
    if type_name.startswith("Literal["):
        options = [str(o) for o in ast.literal_eval(type_name.removeprefix("Literal"))]
        return f"is none of {', '.join(options)}{did_you_mean(str(value), options)}"
    if type_name.startswith("dict["):
        return "is not a section of names and values, {name: value}"
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return f"is not {names.get(type_name, type_name)}"


def _algorithm(cfg: Section) -> Iterator[Fault]:
    """Check an algorithm's shape of rows, task type, rewards and losses."""
    node = cfg.algorithm
    if str(node.shape) not in SHAPES:
        yield "algorithm.shape", f"{node.shape!r} is none of {', '.join(SHAPES)}"
    if node.task_type not in TASKS:
        yield "algorithm.task_type", f"{node.task_type!r} is none of {', '.join(TASKS)}"
    if "rewards" in node:
        yield from _rewards(cfg)
    requested = node.args.get("loss_type") or []
    trainer = str(node.trainer.get("_target_"))
    losses = texts_compared_with(trainer, "loss_type") if requested else ()
    for loss in requested if isinstance(requested, list) else [requested]:
        if losses and loss not in losses:
            near = did_you_mean(str(loss), losses)
            text = f"{loss!r} is none of {', '.join(sorted(losses))}{near}"
            yield "algorithm.args.loss_type", text


def _rewards(cfg: Section) -> Iterator[Fault]:
    rewards = cfg.algorithm.rewards
    if not isinstance(rewards, list) or not rewards:
        text = "name at least one: algorithm.rewards=[lora_exp.rewards.exact_match], or a reward"
        yield "algorithm.rewards", f"{text} adapter's folder"
        return
    trainer_signature = signature(cfg.algorithm.trainer._target_)
    if trainer_signature is not None and "reward_funcs" not in trainer_signature.arguments:
        yield "algorithm.rewards", f"{cfg.algorithm.trainer._target_} takes no rewards"
    for i, name in enumerate(rewards):
        key = f"algorithm.rewards.{i}"
        if isinstance(name, str) and is_path(name):
            try:
                adapter_config(name)
            except ConfigError as error:
                yield key, error.faults[0][1]
        elif isinstance(name, str):
            if is_trusted(name, cfg.trusted_targets) and signature(name) is None:
                yield key, f"no function is called {name}"
        elif not isinstance(name, Section) or "_target_" not in name:
            yield key, "is no dotted name, no folder and no section with a _target_"
    weights = cfg.algorithm.args.get("reward_weights")
    is_list = isinstance(weights, list)
    if weights is not None and (not is_list or len(weights) != len(rewards)):
        count = len(weights) if is_list else 1
        text = f"{count} weights for {len(rewards)} rewards; a list has one for each"
        yield "algorithm.args.reward_weights", text


def _secrets(values: dict[str, Any]) -> Iterator[Fault]:
    """Refuse secrets: trainers pickle their arguments into every checkpoint."""
    for key in secret_keys(values):
        yield key, "is a secret, and configs are saved; export it instead (HF_TOKEN, WANDB_API_KEY)"
