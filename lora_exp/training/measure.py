"""Evaluation before and after training: metrics, answers, preference accuracy."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_exp.data.encoding import text_ids, text_prompt
from lora_exp.data.formats import common_prefix
from lora_exp.data.template import render_chat
from lora_exp.data.tokens import Tokens
from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.model.determinism import forked_random_state
from lora_exp.model.loading import Base
from lora_exp.parallel.world import world
from lora_exp.record.metrics import grouped_metrics
from lora_exp.record.run import Record
from lora_exp.training.answers import Answer, HeldOut, answered, exact_match_rates
from lora_exp.training.best import saved_step
from lora_exp.training.longest_first import LongestFirst
from lora_exp.training.place import Place
from lora_exp.training.row_losses import row_losses_at
from lora_exp.training.untrained import Measured, content

LOGITS = 2**28  # held at a time, 1 GiB in float32


def before(
    cfg: DictConfig, trainer: Any, base: Base, held_out: HeldOut, record: Record, place: Place
) -> list[dict[str, Any]]:
    """Measure before training; a resumed run reads the saved results."""
    if cfg.resume and any(name.startswith("before/") for name in record.values["metrics"]):
        return record.samples()
    measured = place.untrained(
        cfg,
        trainer,
        lambda: _measure("before training", cfg, trainer, base, held_out, 0),
        lambda: content(cfg, trainer.model, base, held_out.rows, record),
    )
    metrics, answers = _all_metrics(cfg, *measured), measured[2]
    record.update(metrics={f"before/{name}": value for name, value in metrics.items()})
    samples = [
        {
            "prompt": a.prompt,
            "expected": a.expected,
            "task": a.task,
            "before": a.text,
            "after": None,
        }
        for a in answers
    ]
    record.write_samples(samples)
    return samples


def after(
    cfg: DictConfig,
    trainer: Any,
    base: Base,
    held_out: HeldOut,
    record: Record,
    samples: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measure after training, and add the answers to those from before."""
    step = saved_step(trainer)
    measured = _measure("after training", cfg, trainer, base, held_out, step)
    _, preferred, answers = measured
    metrics = _all_metrics(cfg, *measured)
    record.update(metrics={f"eval/{name}": value for name, value in metrics.items()})
    pairs = zip(samples, answers, strict=True)
    samples = [sample | {"after": a.text} for sample, a in pairs]
    record.write_samples(samples)
    if cfg.algorithm.shape == "completion" and trainer.eval_dataset is not None:
        record.write_json("row_losses.json", asdict(row_losses_at(trainer, step)))
    if preferred is not None:
        hashes = [_hash(row) for row in held_out.rows]
        record.write_json("pairs.json", {"pairs": hashes, "preferred": preferred})
    return samples


def _hash(row: Row) -> str:
    """Return a hash of what a pair's preference depends on."""
    parts = [row.get(key) for key in ("prompt", "chosen", "rejected", "tools")]
    text = json.dumps(parts, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=6).hexdigest()


def present(
    objective: str, cfg: DictConfig, trainer: Any, base: Base, held_out: HeldOut
) -> dict[str, float]:
    """Measure a trainer's present weights, as far as an objective needs it.

    Neither the random state nor the trainer's history is changed, by which it finds its best
    evaluation. One that the trainer has made itself at this step is not repeated.

    Returns:
        Metrics by name, the objective among them.
    """
    step, history = trainer.state.global_step, trainer.state.log_history
    entries = len(history)
    with _kept_random_state():
        if objective.removeprefix("eval/") in cfg.algorithm.metrics:
            metrics = _all_metrics(cfg, _evaluated(trainer, step), None, [])
        else:
            measured = _measure(f"at step {step}", cfg, trainer, base, held_out, step)
            metrics = _all_metrics(cfg, *measured)
    del history[entries:]
    return {f"eval/{name}": value for name, value in metrics.items()}


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch: rewards may draw from any."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with forked_random_state():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def objective_name(wanted: str, metrics: dict[str, float], held_out: Tokens | None) -> str:
    """Return the name of the run's objective; without held-out rows that is train/loss.

    Raises:
        ConfigError: there is no such metric.
    """
    known = [f"eval/{k.removeprefix('before/')}" for k in metrics if k.startswith("before/")]
    if wanted in [*known, "train/loss"]:
        return wanted
    if held_out is None and wanted.startswith("eval/"):
        return "train/loss"
    text = f"{wanted!r} is none of {', '.join(['train/loss', *known])}{did_you_mean(wanted, known)}"
    raise ConfigError([("objective", text)])


def _measure(
    when: str, cfg: DictConfig, trainer: Any, base: Base, held_out: HeldOut, step: int
) -> Measured:
    """Evaluate and answer with the trainer's present weights, which are those of a step."""
    metrics = _evaluated(trainer, step)
    answers_here = world.is_first or world.in_step
    answered = _answered(when, cfg, trainer, base, held_out) if answers_here else None
    preferred, answers = world.shared(answered) or (None, [])
    return metrics, preferred, answers


def _answered(
    when: str, cfg: DictConfig, trainer: Any, base: Base, held_out: HeldOut
) -> tuple[list[bool] | None, list[Answer]]:
    """Return the preferences, where rows are pairs, and answers to held-out prompts."""
    with trainer.accelerator.autocast():  # in the precision that the loss is computed in
        if not trainer.model.can_generate():
            return None, []
        preferred = None
        rows = held_out.rows
        if rows and "chosen" in rows[0]:
            preferred = preferences(trainer.model, base.tokenizer, rows, trainer.args)
        asked = held_out.questions
        return preferred, answered(trainer.model, base.tokenizer, asked, cfg.samples, when)


def _evaluated(trainer: Any, step: int) -> dict[str, float]:
    """Return the trainer's evaluation of its present weights, which are those of a step."""
    history = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    entries = [entry for entry in history if step and entry["step"] == step]
    if not entries and trainer.eval_dataset is not None:
        trainer.evaluate()
        entries = [trainer.state.log_history[-1]]  # it logs more than it returns
    return _evaluation(entries[-1]) if entries else {}


def _evaluation(entry: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if key.startswith("eval_")}


def _all_metrics(
    cfg: DictConfig,
    trainer_metrics: dict[str, float],
    preferred: list[bool] | None,
    answers: list[Answer],
) -> dict[str, float]:
    """Return the algorithm's own metrics, the preference accuracy and exact match."""
    numbers = grouped_metrics(trainer_metrics)
    names = cfg.algorithm.metrics
    metrics = {name: numbers[f"eval/{name}"] for name in names if f"eval/{name}" in numbers}
    if preferred is not None:
        metrics["preference_accuracy"] = sum(preferred) / len(preferred)
    return metrics | exact_match_rates(answers)


@torch.no_grad()
def preferences(model: Any, tokenizer: Any, pairs: Sequence[Row], args: Any) -> list[bool]:
    """Return of each pair whether its chosen answer is more likely, as a whole, than the rejected.

    No reference model is used: only the probabilities of the model itself.
    """
    training = model.training
    model.eval()
    keys = ("chosen", "rejected")
    encodings = [[encoded(row, key, tokenizer) for key in keys] for row in pairs]
    lengths = [max(len(ids) for ids, _ in pair) for pair in encodings]
    order, preferred = list(LongestFirst(lengths)), [False] * len(pairs)
    size = max(1, args.per_device_eval_batch_size // 2)
    for i in range(0, len(pairs), size):
        batch = order[i : i + size]
        both = [encodings[n][j] for j in range(len(keys)) for n in batch]
        vocab_size = model.get_output_embeddings().weight.shape[0]
        longest = max(len(ids) for ids, _ in both) - min(start for _, start in both) + 1
        rows = max(1, LOGITS // (vocab_size * longest))
        parts = [both[j : j + rows] for j in range(0, len(both), rows)]
        total = torch.cat([_likelihoods(model, tokenizer, part) for part in parts])
        for n, higher in zip(batch, total[: len(batch)] > total[len(batch) :], strict=True):
            preferred[n] = bool(higher)
    model.train(training)
    return preferred


def _likelihoods(model: Any, tokenizer: Any, encodings: list[tuple[list[int], int]]) -> Tensor:
    """Return the log-probability of each row's answer, [B]; no other logits are computed."""
    from trl.trainer.utils import selective_log_softmax  # here: `evaluate` runs without trl

    ids = tokenizer.pad(
        {"input_ids": [ids for ids, _ in encodings]}, padding_side="right", return_tensors="pt"
    ).to(model.device)
    length = ids["input_ids"].shape[1]
    first = min(start for _, start in encodings)
    kept = min(length, length - first + 1)  # the token before an answer predicts its first one
    logits = model(**ids, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
    chosen = ids["input_ids"][:, length - kept + 1 :]
    positions = torch.arange(length - kept + 1, length, device=model.device)
    totals = []
    for i, (_, start) in enumerate(encodings):  # one row at a time becomes float32
        logps = selective_log_softmax(logits[i : i + 1].float(), chosen[i : i + 1])[0]
        counts = (positions >= start) & ids["attention_mask"][i, length - kept + 1 :].bool()
        totals.append((logps * counts).sum())
    return torch.stack(totals)


def encoded(row: Row, key: str, tokenizer: Any) -> tuple[list[int], int]:
    """Return the tokens of prompt and answer, and the index where the answer starts.

    Args:
        row: a pair.
        key: of the answer: `chosen` or `rejected`.
        tokenizer: the base's.
    """
    if isinstance(row["prompt"], str):
        prompt = text_prompt(row["prompt"], tokenizer)
        whole = text_ids(row["prompt"] + row[key], tokenizer)
    else:
        start = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
        text = render_chat(row["prompt"] + row[key], tokenizer, row.get("tools"))
        prompt, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (start, text))
    return whole, common_prefix(prompt, whole)
