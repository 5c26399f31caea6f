"""What is measured before training, kept in the cache by all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.adapter.several import changes_nothing, is_adapted
from lora_exp.config.door import plain
from lora_exp.config.settled import SWITCHES
from lora_exp.config.sharding import shares_all
from lora_exp.data.template import template_of
from lora_exp.data.turns import Row
from lora_exp.files.paths import results_dir
from lora_exp.files.whole import write_whole
from lora_exp.model.loading import Base
from lora_exp.parallel.world import world
from lora_exp.record.conditions import conditions
from lora_exp.record.run import Record
from lora_exp.training.answers import Answer

# the trainer's metrics, which pairs have their chosen answer preferred, the answers
Measured = tuple[dict[str, float], list[bool] | None, list[Answer]]
Measure = Callable[[], Measured]
Content = Callable[[], str | None]
VERSION = 3  # of what is measured, and how; part of the key
# settings of training that cannot change what is measured before it
UNTRAINED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "weight_decay", "max_grad_norm", "optim", "logging_steps", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps", "save_total_limit",
)  # fmt: skip
# arguments of a LoRA that changes no output yet
SHAPE = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "use_rslora",
)  # fmt: skip


def is_random(cfg: DictConfig) -> bool:
    """Return whether what is measured before training depends on the job: sampled answers."""
    return bool(cfg.algorithm.shape == "prompt")


def settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of a config that decides what a base answers and loses before training."""
    values = plain(cfg)
    sections = ("model", "quant", "algorithm", "data", "samples", "adapter")
    train = {name: value for name, value in values["train"].items() if name not in UNTRAINED}
    head = cfg.seed if cfg.algorithm.task_type == "SEQ_CLS" else None  # its weights are random
    rounded = shares_all(cfg)  # in bfloat16, in another way than where each process has all weights
    own = {"train": train, "head": head, "shares_all": rounded}
    own |= {key: values[key] for key, usual in SWITCHES.items() if values[key] != usual}
    return {name: values[name] for name in sections} | own


def content(
    cfg: DictConfig, model: Any, base: Base, held_out: Sequence[Row], record: Record
) -> str | None:
    """Return a hash of all that decides what is measured before training.

    Args:
        cfg: the run's.
        model: the trainer's, before training.
        base: the run's.
        held_out: the rows that are measured.
        record: with the hashes of the run's inputs.

    Returns:
        None: it depends on what no hash covers: random numbers, other people's code, a base
        without a hash.
    """
    if is_random(cfg) or cfg.trusted_targets or cfg.model.trust_remote_code or not base.revision:
        return None
    adapter, seed = plain(cfg)["peft"], cfg.seed
    if not is_adapted(model) or changes_nothing(model):
        adapter = adapter and {k: v for k, v in adapter.items() if k not in SHAPE}
        seed = cfg.seed if cfg.model.random_weights or cfg.model.add_tokens else None
    inputs = {name: record.values[name] for name in ("base", "base_files", "adapters")}
    inputs["template"] = template_of(base.tokenizer)  # with the run's day, where it writes one
    values = settings(cfg) | {"data": [*held_out], "adapter": adapter}  # their content, not where
    parts = [VERSION, values, seed, inputs, conditions()]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def recalled(trainer: Any, measure: Measure, key: Content) -> Measured:
    """Return what was measured before with the same content, else measure.

    Args:
        trainer: logs the metrics, as it does when it measures them.
        measure: measures.
        key: gives the `content`.
    """
    folder = results_dir("untrained")
    name = key() if folder else None
    if folder is None or name is None:
        return measure()
    path = folder / f"{name}.json"
    results = world.shared(_read(path))  # processes of one run do the same
    if results is None:
        results = measure()
        if world.is_first:
            _write(path, results)
    elif results[0]:
        trainer.log(dict(results[0]))
    return results


def _read(path: Path) -> Measured | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(path.read_text(encoding="utf-8"))
        answers = [Answer(**answer) for answer in values["answers"]]
        return dict(values["metrics"]), values["preferred"], answers
    return None


def _write(path: Path, results: Measured) -> None:
    metrics, preferred, answers = results
    values = {"metrics": metrics, "preferred": preferred, "answers": [vars(a) for a in answers]}
    with suppress(OSError):  # on a full disk it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values) + "\n")
