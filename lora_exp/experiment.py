"""The line that every run follows: config, base, adapter, rows, trainer, artifacts.

Only this module knows all stages; numbers flow outward, the config is read-only.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from transformers import TrainerCallback, set_seed

from lora_exp.adapter import Adapted, attach, save
from lora_exp.card import model_card
from lora_exp.config import build, plain, run_dir
from lora_exp.console import show
from lora_exp.data import Rows
from lora_exp.display import Progression, quiet
from lora_exp.divergence import FiniteLoss
from lora_exp.errors import ConfigError, DivergedError, did_you_mean
from lora_exp.memory import peak_bytes
from lora_exp.model import Base, device, has_bfloat16, lacks_bfloat16
from lora_exp.place import Alone, Place
from lora_exp.record import Record
from lora_exp.redaction import redact
from lora_exp.samples import Answer, answer, exact_match, virtual_tokens
from lora_exp.signature import signature
from lora_exp.spare import spare
from lora_exp.summary import announce, conclude, counts
from lora_exp.tokens import Tokens, tokenise
from lora_exp.tracking import Metrics, Nowhere, Tracker, named

log = logging.getLogger("lora_exp")


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    objective: float
    metrics: dict[str, float]
    directory: Path
    saved: Path


def run(
    cfg: DictConfig,
    directory: str | Path | None = None,
    sweep: str | None = None,
    place: Place | None = None,
) -> Result:
    """Train what a validated config describes, and save it.

    Args:
        cfg: from `compose`.
        directory: the run's; null makes one under outputs/, or takes the one that it resumes.
        sweep: the sweep's name, which groups its runs.
        place: where it trains; alone in this process unless a pack gives it a seat.

    Raises:
        LoraExpError: what the user can mend, by name and place.
        DivergedError: the loss stopped being finite.
    """
    quiet()
    place = place or Alone()
    record = Record(Path(directory or run_dir(cfg.resume)), cfg)
    try:
        with record.outcome():
            return _run(cfg, record, sweep, place)
    finally:
        place.leave()


def _run(cfg: DictConfig, record: Record, sweep: str | None, place: Place) -> Result:
    started = time.perf_counter()
    rows: Rows = build(cfg, "data")
    set_seed(cfg.seed)
    base = place.base(cfg)
    adapted = attach(base, cfg, record.directory)
    train, held_out = _tokens(rows, base, adapted, cfg)
    record.update(
        place=place.name,
        counts=counts(adapted, train, held_out),
        base=base.revision,
        data=rows.source,
    )
    announce(cfg, rows, base, adapted, train, held_out)
    tracker = _tracker(cfg, record, sweep)
    board = place.board()
    saved = None
    try:
        trainer = _trainer(
            cfg, base, adapted, train, held_out, record,
            [Metrics(record, tracker), Progression(board)],
        )  # fmt: skip
        place.join(trainer)
        samples = _before(cfg, trainer, base, rows, record, place)
        objective = _objective(cfg.objective, record.values["metrics"], held_out)
        set_seed(cfg.seed)  # the training's random numbers do not depend on what was measured
        _train(trainer, cfg.resume, record)
        samples = _after(cfg, trainer, base, rows, record, samples)
        folder = record.directory / ("adapter" if adapted.method else "model")
        save(adapted, base, folder, model_card(cfg, base, rows, record.values))
        saved = folder
        tracker.samples(samples, trainer.state.global_step)
        record.update(objective=objective, metrics={"seconds": time.perf_counter() - started})
    finally:
        board.close()
        tracker.finish(record.summary(), saved)
    metrics = record.values["metrics"]
    conclude(record, objective, tracker.place, saved)
    return Result(metrics[objective], metrics, record.directory, saved)


def _tokens(
    rows: Rows, base: Base, adapted: Adapted, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    args = cfg.algorithm.args
    context = getattr(base.model.config, "max_position_embeddings", None) or math.inf
    if (args.max_length or 0) > context:
        text = f"{args.max_length} is longer than the model's context of {context} tokens"
        raise ConfigError([("algorithm.args.max_length", text)])
    if rows.chat_template is not None:
        base.tokenizer.chat_template = rows.chat_template
    splits = args.packing and args.get("packing_strategy") in ("wrapped", "bfd_split")
    room = min(args.max_length or math.inf, context - virtual_tokens(adapted.model))
    options: dict[str, Any] = {
        "max_length": None if splits or room == math.inf else int(room),
        "completion_only": bool(args.completion_only_loss),
    }
    train = tokenise(rows.train, base.tokenizer, what="train", **options)
    held_out = tokenise(rows.eval, base.tokenizer, what="eval", **options) if rows.eval else None
    return train, held_out


def _trainer(
    cfg: DictConfig,
    base: Base,
    adapted: Adapted,
    train: Tokens,
    held_out: Tokens | None,
    record: Record,
    callbacks: list[TrainerCallback],
) -> Any:
    """Build the algorithm's own trainer from its own arguments; nothing of it is changed."""
    settings = plain(cfg.train)
    if settings["bf16"] is None:
        settings |= _precision(cfg, base)
    if held_out is None:
        settings["eval_strategy"] = "no"
    known = signature(cfg.algorithm.args._target_)
    if known and "dataset_kwargs" in known.arguments and not cfg.algorithm.args.packing:
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}  # tokens and labels are there
    args = build(
        cfg,
        "algorithm.args",
        **settings,
        seed=cfg.seed,
        output_dir=str(record.directory / "checkpoints"),
        report_to=[],
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() != "cpu",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it would log a loss of 0 where there is none
    )
    trainer = build(
        cfg,
        "algorithm.trainer",
        model=adapted.model,
        args=args,
        train_dataset=train.dataset,
        eval_dataset=held_out.dataset if held_out else None,
        processing_class=base.tokenizer,
        callbacks=[FiniteLoss(), *adapted.callbacks, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    spare(trainer.model)
    evaluate = trainer.evaluate

    def unnoticed(*arguments: Any, **options: Any) -> Any:
        """Evaluate without moving the random streams: loaders draw a seed that they never use."""
        with torch.random.fork_rng():
            return evaluate(*arguments, **options)

    trainer.evaluate = unnoticed
    for parameter in adapted.model.parameters():
        if (
            adapted.method and parameter.requires_grad
        ):  # trl casts to bfloat16 on quantised bases: docs/decisions/0003
            parameter.data = parameter.data.float()
    return trainer


def _precision(cfg: DictConfig, base: Base) -> dict[str, bool]:
    """Compute in 16 bits what is held in few, and whole float32 weights where a GPU can."""
    if cfg.quant is not None:
        half = cfg.quant.get("compute_dtype") == "float16" or lacks_bfloat16()
        return {"bf16": not half, "fp16": half}
    whole = cfg.peft is None and has_bfloat16()
    return {"bf16": whole or base.model.dtype == torch.bfloat16}


def _tracker(cfg: DictConfig, record: Record, sweep: str | None) -> Tracker:
    tracker: Tracker | None = build(
        cfg,
        "tracking",
        directory=record.directory,
        run_id=record.values["tracking_id"],
        name=cfg.name,
        sweep=sweep,
        job_type=cfg.choices.algorithm,
        tags=[f"{group}={option}" for group, option in cfg.choices.items()],
        config=redact(plain(cfg)),
    )
    return tracker or Nowhere()


def _before(
    cfg: DictConfig, trainer: Any, base: Base, rows: Rows, record: Record, place: Place
) -> list[dict[str, Any]]:
    """Measure the base's held-out loss and answers; a resumed run has them on file."""
    if cfg.resume and (samples := record.samples()):
        return samples
    seen, answers = place.untrained(
        cfg, trainer, lambda: _measure("before", cfg, trainer, base, rows)
    )
    metrics = _kept(seen, answers)
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


def _objective(wanted: str, metrics: dict[str, float], held_out: Tokens | None) -> str:
    """Return the metric that the run is judged by.

    Raises:
        ConfigError: there is no such metric. Without held-out rows there is only the training loss.
    """
    known = [f"eval/{k.removeprefix('before/')}" for k in metrics if k.startswith("before/")]
    if wanted in [*known, "train/loss"]:
        return wanted
    if held_out is None and wanted == "eval/loss":
        return "train/loss"
    text = f"{wanted!r} is none of {', '.join(['train/loss', *known])}{did_you_mean(wanted, known)}"
    raise ConfigError([("objective", text)])


def _after(
    cfg: DictConfig,
    trainer: Any,
    base: Base,
    rows: Rows,
    record: Record,
    samples: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    seen, answers = _measure("after", cfg, trainer, base, rows)
    metrics = _kept(seen, answers)
    record.update(metrics={f"eval/{name}": value for name, value in metrics.items()})
    pairs = zip(samples, answers, strict=True)
    samples = [sample | {"after": found.said} for sample, found in pairs]
    record.keep_samples(samples)
    return samples


def _measure(
    when: str, cfg: DictConfig, trainer: Any, base: Base, rows: Rows
) -> tuple[dict[str, float], list[Answer]]:
    seen = _latest(trainer) or (trainer.evaluate() if trainer.eval_dataset is not None else {})
    with trainer.accelerator.autocast():  # in the precision that the loss is computed in
        return seen, answer(trainer.model, base.tokenizer, rows.eval, cfg.samples, when)


def _latest(trainer: Any) -> dict[str, float]:
    """Return what was evaluated at this very step, if it was: nothing has changed since."""
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    step, trained = trainer.state.global_step, trainer.state.global_step > 0
    return dict(history[-1]) if trained and history and history[-1]["step"] == step else {}


def _kept(seen: dict[str, float], answers: list[Answer]) -> dict[str, float]:
    """Return what is said of held-out rows: loss, token accuracy and exact match."""
    numbers = named(seen)
    kept = ("loss", "mean_token_accuracy")
    metrics = {name: numbers[f"eval/{name}"] for name in kept if f"eval/{name}" in numbers}
    return metrics | exact_match(answers)


def _train(trainer: Any, resume: str | None, record: Record) -> None:
    checkpoint, first = _newest(record, resume)
    started = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    if not math.isfinite(output.training_loss):
        raise DivergedError(f"the training loss ended as {output.training_loss}")
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    counted = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    tokens = counted[-1] if counted else 0  # trl counts from the start of this process
    record.update(
        steps=trainer.state.global_step,
        metrics={
            "train/loss": losses[-1] if losses else output.training_loss,
            "train/seconds": seconds,
            "train/steps_per_s": (trainer.state.global_step - first) / seconds,
            "train/tokens_per_s": tokens / seconds,
            "peak_bytes": float(peak_bytes()),
        },
    )


def _newest(record: Record, resume: str | None) -> tuple[str | None, int]:
    """Return the newest checkpoint of a run that goes on and its step; later log lines go."""
    if not resume:
        return None, 0
    found = filter(_whole, (record.directory / "checkpoints").glob("checkpoint-*"))
    steps = {int(path.name.rpartition("-")[2]): path for path in found}
    step = max(steps, default=0)
    if not steps:
        log.warning("resume: %s has no checkpoint yet; training starts anew", record.directory)
    record.rewind(step)
    show(f"goes on from step {step}")
    return str(steps[step]) if steps else None, step


def _whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint was written to its end: the trainer's state is its last file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.warning("%s was cut off while it was written; an older one is taken", checkpoint)
        return False
    return True
