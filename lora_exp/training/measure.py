"""Evaluation before and after training: metrics, answers, preference accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_exp.data.formats import common_prefix
from lora_exp.data.template import render_chat
from lora_exp.data.tokens import Tokens
from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.model.loading import Base
from lora_exp.record.metrics import named
from lora_exp.record.run import Record
from lora_exp.training.answers import Answer, answer, exact_match
from lora_exp.training.best import saved_step
from lora_exp.training.place import Place

LOGITS = 2**28  # numbers that are held at a time, 1 GiB in float32

if TYPE_CHECKING:
    from lora_exp.training.place import Measured


def before(
    cfg: DictConfig, trainer: Any, base: Base, held_out: list[Row], record: Record, place: Place
) -> list[dict[str, Any]]:
    """Measure before training; a resumed run reads the saved results."""
    if cfg.resume and any(name.startswith("before/") for name in record.values["metrics"]):
        return record.samples()
    seen, prefers, answers = place.untrained(
        cfg, trainer, lambda: _measure("before", cfg, trainer, base, held_out)
    )
    metrics = _kept(cfg, seen, prefers, answers)
    record.update(metrics={f"before/{name}": value for name, value in metrics.items()})
    samples = [
        {
            "prompt": a.prompt,
            "expected": a.expected,
            "task": a.task,
            "before": a.said,
            "after": None,
        }
        for a in answers
    ]
    record.keep_samples(samples)
    return samples


def after(
    cfg: DictConfig,
    trainer: Any,
    base: Base,
    held_out: list[Row],
    record: Record,
    samples: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measure after training, and add the answers to those from before."""
    seen, prefers, answers = _measure("after", cfg, trainer, base, held_out)
    metrics = _kept(cfg, seen, prefers, answers)
    record.update(metrics={f"eval/{name}": value for name, value in metrics.items()})
    pairs = zip(samples, answers, strict=True)
    samples = [sample | {"after": found.said} for sample, found in pairs]
    record.keep_samples(samples)
    return samples


def objective(wanted: str, metrics: dict[str, float], held_out: Tokens | None) -> str:
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


def _measure(when: str, cfg: DictConfig, trainer: Any, base: Base, held_out: list[Row]) -> Measured:
    seen = _latest(trainer)
    if seen is None:
        seen = {}
        if trainer.eval_dataset is not None:
            trainer.evaluate()
            seen = _evaluated(trainer.state.log_history[-1])  # trainers log more than they return
    with trainer.accelerator.autocast():  # in the precision that the loss is computed in
        if not trainer.model.can_generate():
            return seen, None, []
        prefers = None
        if held_out and "chosen" in held_out[0]:
            prefers = preference_accuracy(trainer.model, base.tokenizer, held_out, trainer.args)
        what = f"{when} training"
        answers = answer(trainer.model, base.tokenizer, held_out, cfg.samples, what)
        return seen, prefers, answers


def _latest(trainer: Any) -> dict[str, float] | None:
    """Return what was evaluated of the weights that the trainer holds now, if that was done."""
    step = saved_step(trainer)
    history = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    entries = [entry for entry in history if step and entry["step"] == step]
    return _evaluated(entries[-1]) if entries else None


def _evaluated(entry: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if key.startswith("eval_")}


def _kept(
    cfg: DictConfig, seen: dict[str, float], prefers: float | None, answers: list[Answer]
) -> dict[str, float]:
    """Return the algorithm's own metrics, the pairs preferred rightly, and exact match."""
    numbers = named(seen)
    kept = cfg.algorithm.metrics
    metrics = {name: numbers[f"eval/{name}"] for name in kept if f"eval/{name}" in numbers}
    metrics |= {} if prefers is None else {"preference_accuracy": prefers}
    return metrics | exact_match(answers)


@torch.no_grad()
def preference_accuracy(model: Any, tokenizer: Any, pairs: list[Row], args: Any) -> float:
    """Return the share of pairs whose chosen answer is more likely, as a whole, than the rejected.

    No reference model is used: only the probabilities of the model itself.
    """
    training = model.training
    model.eval()
    wins = 0
    size = max(1, args.per_device_eval_batch_size // 2)
    for i in range(0, len(pairs), size):
        batch = pairs[i : i + size]
        both = [encoded(row, key, tokenizer) for key in ("chosen", "rejected") for row in batch]
        words = model.get_output_embeddings().weight.shape[0]
        most = max(len(ids) for ids, _ in both) - min(start for _, start in both) + 1
        rows = max(1, LOGITS // (words * most))
        parts = [both[j : j + rows] for j in range(0, len(both), rows)]
        total = torch.cat([_likelihoods(model, tokenizer, part) for part in parts])
        wins += int((total[: len(batch)] > total[len(batch) :]).sum())
    model.train(training)
    return wins / len(pairs)


def _likelihoods(model: Any, tokenizer: Any, encodings: list[tuple[list[int], int]]) -> Tensor:
    """Return the log-probability of each row's answer, [B]; no other logits are computed."""
    from trl.trainer.utils import selective_log_softmax  # evaluating does without trl

    ids = tokenizer.pad(
        {"input_ids": [ids for ids, _ in encodings]}, padding_side="right", return_tensors="pt"
    ).to(model.device)
    length = ids["input_ids"].shape[1]
    first = min(start for _, start in encodings)
    kept = min(length, length - first + 1)  # the token before an answer predicts its first one
    logits = model(**ids, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
    chosen = ids["input_ids"][:, length - kept + 1 :]
    place = torch.arange(length - kept + 1, length, device=model.device)
    totals = []
    for i, (_, start) in enumerate(encodings):  # one row at a time becomes float32
        logps = selective_log_softmax(logits[i : i + 1].float(), chosen[i : i + 1])[0]
        counts = (place >= start) & ids["attention_mask"][i, length - kept + 1 :].bool()
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
        start, text = row["prompt"], row["prompt"] + row[key] + tokenizer.eos_token
        asked, whole = (tokenizer(t)["input_ids"] for t in (start, text))
    else:
        start = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
        text = render_chat(row["prompt"] + row[key], tokenizer, row.get("tools"))
        asked, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (start, text))
    return whole, common_prefix(asked, whole)
