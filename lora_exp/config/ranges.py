"""Numbers of a config that are out of range. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

Fault = tuple[str, str]  # the key, and what is wrong with it


def range_faults(cfg: Any) -> Iterator[Fault]:
    """Yield a fault for each number that is out of range.

    Args:
        cfg: a settled config, or its sections.
    """
    yield from _adapter_ranges(cfg.peft or {})
    yield from _training_ranges(cfg.train)
    for name, least in (("rows", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if not isinstance(cfg.samples[name], int) or cfg.samples[name] < least:
            yield f"samples.{name}", f"{cfg.samples[name]!r} is not {least} or more"
    if cfg.goal not in ("minimize", "maximize"):
        yield "goal", f"{cfg.goal!r} is neither minimize nor maximize"
    yield from _algorithm_ranges(cfg)
    yield from _lockstep_ranges(cfg.lockstep)
    yield from _data_ranges(cfg.data)
    for name in ("deterministic", "batch_invariant"):
        if not isinstance(cfg[name], bool):
            yield name, f"{cfg[name]!r} is neither true nor false"
    if cfg.batch_invariant is True and not (find_spec("megatron") and find_spec("megatron.core")):
        text = 'needs the package megatron-core: pip install "lora-exp[batch-invariant]"'
        yield "batch_invariant", text
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        yield "seed", f"{cfg.seed!r} is no seed; give a whole number from 0 and below 2**32"
    if not 0 < len(str(cfg.name)) <= 128 or "/" in str(cfg.name) or str(cfg.name).startswith("."):
        yield "name", "give 1 to 128 characters, no slash, no leading dot: it is not a path"
    if cfg.get("sweep_name") is not None and not 0 < len(str(cfg.sweep_name)) <= 128:
        yield "sweep_name", "give 1 to 128 characters"
    if cfg.report is not None and not re.fullmatch(r"[^/\\]+\.html", str(cfg.report)):
        yield "report", f"{cfg.report!r} is no file name that ends in .html; null writes no report"
    project = str((cfg.tracking or {}).get("project") or "x")
    if not 0 < len(project) <= 128 or set(project) & set("/\\#?%:"):
        yield "tracking.project", f"{project!r}: give 1 to 128 characters, none of / \\ # ? % :"


def _adapter_ranges(peft: Mapping[str, Any]) -> Iterator[Fault]:
    what = dict.fromkeys(("r", "init_r", "target_r"), "a rank")
    for name, noun in (what | {"num_virtual_tokens": "a number of tokens"}).items():
        least = 0 if name == "r" and "oft_block_size" in peft else 1
        if name in peft and is_number(peft[name]) and peft[name] < least:
            yield f"peft.{name}", f"{peft[name]} is not {noun}; give {least} or more"
    alpha = peft.get("lora_alpha", 1)
    if is_number(alpha) and not 0 < alpha < math.inf:
        yield (
            "peft.lora_alpha",
            f"{alpha} switches the adapter off or reverses it; give a number above 0",
        )
    for key, kind, noun in (
        ("rank_pattern", int, "a rank; give 1 or more"),
        ("alpha_pattern", int | float, "an alpha; give a number above 0"),
    ):
        for name, value in (peft.get(key) or {}).items():
            if not (is_number(value) and isinstance(value, kind) and 0 < value < math.inf):
                yield f"peft.{key}", f"{name}: {value!r} is not {noun}"
    for name in (name for name in peft if name.endswith("dropout")):
        if is_number(peft[name]) and not 0 <= peft[name] < 1:
            yield f"peft.{name}", f"{peft[name]} is not a probability; give 0 or more and below 1"


def _training_ranges(train: Any) -> Iterator[Fault]:
    if is_number(train.learning_rate) and not 0 < train.learning_rate < math.inf:
        text = f"{train.learning_rate} trains nothing; give a rate above 0 (LoRA 1e-4 to 5e-4)"
        yield "train.learning_rate", text
    if is_number(train.max_steps) and train.max_steps != -1 and train.max_steps < 1:
        yield (
            "train.max_steps",
            f"{train.max_steps} trains nothing; give 1 or more, or -1 for epochs",
        )
    if train.max_steps == -1 and not 0 < number(train.num_train_epochs, 1) < math.inf:
        yield "train.num_train_epochs", f"{train.num_train_epochs} trains nothing; give above 0"
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if is_number(train[name]) and train[name] < 1:
            yield f"train.{name}", f"{train[name]} is below 1"
    for name in ("gradient_accumulation_steps", "logging_steps", "save_steps"):
        if is_number(train[name]) and not train[name] > 0:
            yield f"train.{name}", f"{train[name]} is not above 0"
    for name in ("logging_steps", "save_steps", "eval_steps"):
        steps = number(train.get(name))
        if steps > 1 and steps % 1:
            yield f"train.{name}", f"{steps} is neither whole nor a share of all steps below 1"


def _data_ranges(data: Any) -> Iterator[Fault]:
    for name in ("max_rows", "max_eval_rows", "rows", "eval_rows"):
        if name in data and data[name] is not None and number(data[name]) < 1:
            yield f"data.{name}", f"{data[name]!r} is not 1 or more; null takes all"
    processes = data.get("num_proc", 1)
    if type(processes) is not int or processes < 1:
        yield "data.num_proc", f"{processes!r} is no number of processes; give 1 or more"
    if "eval_share" in data and not 0 <= number(data.eval_share, -1) < 1:
        yield "data.eval_share", f"{data.eval_share!r} is no share; give 0 or more and below 1"


def _lockstep_ranges(lockstep: Any) -> Iterator[Fault]:
    jobs, share = lockstep.max_jobs, lockstep.verify
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        yield "lockstep.max_jobs", f"{jobs!r} is not 1 or more; null takes what memory holds"
    if not is_number(share) or not 0 <= share <= 1:
        yield "lockstep.verify", f"{share!r} is no share; give 0 to 1"
    for key, first, second in (("mode", "exact", "bmm"), ("on_difference", "retrain", "keep")):
        if lockstep[key] not in (first, second):
            yield f"lockstep.{key}", f"{lockstep[key]!r} is neither {first} nor {second}"


def _algorithm_ranges(cfg: Any) -> Iterator[Fault]:
    args = cfg.algorithm.args
    for name in ("num_generations", "max_completion_length", "num_iterations", "num_minibatches"):
        if name in args and args[name] is not None and number(args[name]) < 1:
            yield f"algorithm.args.{name}", f"{args[name]!r} is not 1 or more"
    for name, low, high in (
        ("temperature", 0, math.inf),
        ("top_p", 0, 1),
        ("gamma", 0, 1),
        ("lam", 0, 1),
    ):
        if name in args and is_number(args[name]) and not low <= args[name] <= high:
            yield f"algorithm.args.{name}", f"{args[name]!r} is not between {low} and {high}"
    for name in ("kl_target", "kl_horizon", "epsilon", "value_epsilon"):
        if name in args and is_number(args[name]) and not args[name] > 0:
            yield f"algorithm.args.{name}", f"{args[name]!r} is not above 0"
    for name in ("beta", "value_coef", "entropy_coef", "missing_eos_penalty"):
        if name in args and is_number(args[name]) and not 0 <= args[name] < math.inf:
            yield f"algorithm.args.{name}", f"{args[name]!r} is not 0 or more"
    if "kl_target" in args and args.kl_target is not None and not args.beta:
        yield "algorithm.args.beta", "0 stays 0, however far the KL is from its target"
    group = args.num_generations if "num_generations" in args else 1
    batch = number(cfg.train.per_device_train_batch_size)
    steps = args.get("steps_per_generation") or cfg.train.gradient_accumulation_steps
    batch *= number(steps)
    if is_number(group) and group > 0 and batch % group and "generation_batch_size" not in args:
        text = f"{group} answers to a prompt do not divide a step's {batch:g} rows"
        yield "algorithm.args.num_generations", f"{text}; train.per_device_train_batch_size={group}"
    if "temperature" in args and args.temperature == 0:
        text = "0 gives the same answer each time, so there is nothing to compare"
        yield "algorithm.args.temperature", text


def is_number(value: Any) -> bool:
    """Return whether a value is a number; True and False, which Python counts as ints, are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any, default: float = 0) -> float:
    """Return a value if it is a number, else the default."""
    return value if is_number(value) and not math.isnan(value) else default
