"""Settings of `early_stopping` that cannot work. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from omegaconf import DictConfig

from lora_exp.config.door import Section
from lora_exp.config.ranges import Fault, is_number, number
from lora_exp.early_stopping.rungs import rung_steps
from lora_exp.errors import did_you_mean

EXACT_MATCH, PREFERENCES = "eval/exact_match", "eval/preference_accuracy"  # from answers


def stopping_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each setting of `early_stopping` that cannot work with the config."""
    node = cfg.early_stopping
    if node is None:
        return
    yield from _ranges(node)
    if "metric" in node:
        yield from _evaluations(cfg)
    else:
        yield from _rungs(cfg)


def _ranges(node: Section) -> Iterator[Fault]:
    for name, least in (("eta", 2), ("n_startup_trials", 1), ("patience", 1)):
        if name in node and is_number(node[name]) and node[name] < least:
            yield f"early_stopping.{name}", f"{node[name]} is below {least}"
    for name in ("n_warmup_steps", "min_delta"):
        if name in node and is_number(node[name]) and not 0 <= node[name] < math.inf:
            yield f"early_stopping.{name}", f"{node[name]} is not 0 or more"
    for name in ("first_rung", "interval"):
        if name in node and is_number(node[name]) and not 0 < node[name] < 1:
            text = f"{node[name]} is no share of the training steps; give more than 0, below 1"
            yield f"early_stopping.{name}", text
    if "upper" in node:
        lower, upper = number(node.lower, -math.inf), number(node.upper, math.inf)
        if node.lower is None and node.upper is None:
            yield "early_stopping", "threshold needs a bound: early_stopping.lower or upper"
        elif not lower < upper:
            yield "early_stopping.lower", f"{node.lower} is not below upper={node.upper}"


def _evaluations(cfg: Section) -> Iterator[Fault]:
    """Check that the metric is in the evaluations during training."""
    rule = cfg.choices.get("early_stopping", "early_stopping")
    key, metric = "early_stopping.metric", cfg.early_stopping.metric
    if metric is None:
        key, metric = "early_stopping", cfg.objective
    known = [f"eval/{name}" for name in cfg.algorithm.metrics]
    if f"eval/{str(metric).removeprefix('eval/')}" not in known:
        near = did_you_mean(str(metric), known)
        text = f"{metric} is not in the evaluations during training{near}; early_stopping.metric="
        yield key, f"{text} takes {', '.join(known)}"
    if cfg.train.eval_strategy == "no":
        yield "train.eval_strategy", f"no, and {rule} looks at evaluations; give epoch or steps"


def _rungs(cfg: Section) -> Iterator[Fault]:
    """Check that jobs are compared on a metric that is there, and after the warm-up."""
    objective, node = str(cfg.objective), cfg.early_stopping
    measured = measured_metrics(cfg)
    if re.fullmatch(rf"{EXACT_MATCH}(_\w+)?", objective):
        if cfg.samples.rows == 0:
            yield "samples.rows", f"0, and jobs are compared by {objective}; give 1 or more"
    elif objective not in measured:
        text = f"jobs are compared by held-out rows at rungs, and {objective} is not measured there"
        yield "objective", f"{text}{did_you_mean(objective, measured)}: {', '.join(measured)}"
    if (cfg.peft or {}).get("_target_") == "peft.AdaLoraConfig":
        text = "adalora cannot resume, and a job may have to wait for others at a rung"
        yield "early_stopping", f"{text}; another peft, or early_stopping=threshold"
    eta = number(node.get("eta"), 2)
    first = number(node.first_rung, max(eta, 2) ** -2)
    if problem := warm_up_problem(first, cfg.train.warmup_steps, cfg.train.max_steps):
        yield "early_stopping.first_rung", problem


def measured_metrics(cfg: DictConfig | Section) -> list[str]:
    """Return the names of what a run measures on held-out rows; one of a task is left out."""
    names = [f"eval/{name}" for name in cfg.algorithm.metrics]
    names += [EXACT_MATCH] * (cfg.samples.rows != 0)
    return names + [PREFERENCES] * (cfg.algorithm.shape == "preference")


def warm_up_problem(first_rung: float, warmup_steps: float, steps: int) -> str | None:
    """Return why the first rung is too early; None: it is not, or that is not known yet.

    Args:
        first_rung: a share of the training steps.
        warmup_steps: below 1 a share of them.
        steps: of the whole training; below 1: not known.
    """
    if not is_number(warmup_steps) or not is_number(steps) or not 0 < first_rung < 1:
        return None
    if steps < 1:
        if warmup_steps >= 1 or first_rung > warmup_steps:
            return None
        where = f"{first_rung:.3g} of the steps is inside the warm-up ({warmup_steps:g} of them)"
    else:  # as transformers rounds
        warmup = math.ceil(warmup_steps * steps) if warmup_steps < 1 else int(warmup_steps)
        first = (rung_steps([first_rung], steps) or [steps])[0]
        if first > warmup:
            return None
        where = f"step {first} is inside the warm-up of {warmup} steps"
    text = f"{where}, where jobs cannot be compared yet"
    return f"{first_rung:.3g}: {text}; give a larger share of the steps, or a shorter warm-up"
