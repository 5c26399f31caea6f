"""The line that every run follows: config, base, adapter, rows, trainer, artifacts.

Only this module knows all stages; numbers flow outward, the config is read-only.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import set_seed

from lora_exp.adapter.attach import Adapted, attach, save
from lora_exp.algorithm.critic import save_value
from lora_exp.config.settled import build, is_path, plain, run_dir
from lora_exp.data.examples import prompts, raw, seen
from lora_exp.data.rows import Rows
from lora_exp.data.tokens import Tokens, tokenise
from lora_exp.errors import ConfigError, DivergedError, Interrupted
from lora_exp.files.redaction import redact
from lora_exp.files.whole import sha256, whole
from lora_exp.model.loading import Base
from lora_exp.model.memory import peak_bytes
from lora_exp.record.card import model_card
from lora_exp.record.console import show
from lora_exp.record.progress import Progression, quiet
from lora_exp.record.run import Record
from lora_exp.record.summary import announce, conclude, counts
from lora_exp.tracking.wandb import Metrics, Nowhere, Tracker
from lora_exp.training.answers import virtual_tokens
from lora_exp.training.checkpoint import newest
from lora_exp.training.guards import check_finite
from lora_exp.training.interruption import stop
from lora_exp.training.measure import after, before, objective
from lora_exp.training.place import Alone, Place
from lora_exp.training.trainer import trainer_of

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
        Interrupted: SIGTERM or Ctrl-C; `resume` goes on.
    """
    quiet()
    place = place or Alone()
    with stop.listening():
        stop.check()
        record = Record(Path(directory or run_dir(cfg.resume)), cfg)
        try:
            with record.outcome():
                return _run(cfg, record, sweep, place)
        finally:
            place.leave()


def _run(cfg: DictConfig, record: Record, sweep: str | None, place: Place) -> Result:
    started = time.perf_counter()
    rows: Rows = build(cfg, "data")
    shaped = rows.shaped(cfg.algorithm.shape)
    set_seed(cfg.seed)
    _tell_skipped(rows)
    base = place.base(cfg)
    stands_on = _stands_on(cfg, rows, base)
    for key, found in stands_on.items():
        record.same(key, found)
    record.begin()
    set_seed(cfg.seed)  # the adapter's start does not depend on who loaded the base
    adapted = attach(base, cfg, record.directory)
    data = _tokens(shaped, base, adapted, cfg)
    tracker = _tracker(cfg, record, sweep)
    board = place.board()
    saved = None
    try:
        callbacks = [Metrics(record, tracker), Progression(board)]
        trainer = trainer_of(cfg, base, adapted, shaped, data, record, callbacks)
        train, held_out = _seen(trainer, cfg, *data)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        adapted = replace(adapted, trainable=trained)  # PPO adds a value
        record.update(
            place=place.name,
            counts=counts(adapted, train, held_out) | {"rows_skipped": len(rows.skipped)},
            **stands_on,
        )
        announce(cfg, rows, base, adapted, train, held_out)
        place.join(trainer)
        samples = before(cfg, trainer, base, rows.eval, record, place)
        judged = objective(cfg.objective, record.values["metrics"], held_out)
        set_seed(cfg.seed)  # the training's random numbers do not depend on what was measured
        _train(trainer, cfg.resume, record)
        with _kept(trainer):
            samples = after(cfg, trainer, base, rows.eval, record, samples)
            saved = _save(cfg, trainer, adapted, base, rows, record)
        tracker.samples(samples, trainer.state.global_step)
        goal = cfg.goal if judged == cfg.objective else "minimize"
        seconds = time.perf_counter() - started
        record.update(objective=judged, goal=goal, metrics={"seconds": seconds})
    finally:
        board.close()
        tracker.finish(record.summary(), saved)
    metrics = record.values["metrics"]
    conclude(record, judged, tracker.place, saved)
    return Result(metrics[judged], metrics, record.directory, saved)


def _save(
    cfg: DictConfig, trainer: Any, adapted: Adapted, base: Base, rows: Rows, record: Record
) -> Path:
    """Write what was trained, each folder whole or not at all."""
    if hasattr(trainer.model, "ppo_value"):
        with whole(record.directory / "value") as made:
            save_value(trainer.model, base, made)
    folder = record.directory / ("adapter" if adapted.method else "model")
    with whole(folder) as made:
        save(adapted, base, made, model_card(cfg, record.values))
    return folder


@contextmanager
def _kept(trainer: Any) -> Iterator[None]:
    """Do what follows training; a run that is asked to stop meanwhile does not lose it."""
    try:
        yield
    except Interrupted:
        trainer.keep()
        raise


def _stands_on(cfg: DictConfig, rows: Rows, base: Base) -> dict[str, Any]:
    """Return what a run cannot go on without: commits and hashes of all that it is made of."""
    data = dict(rows.source)
    if rows.chat_template is not None:
        template = hashlib.sha256(rows.chat_template.encode()).hexdigest()
        data["chat_template"] = f"sha256:{template}"
    named = [cfg.adapter, *(cfg.algorithm.rewards if "rewards" in cfg.algorithm else ())]
    folders = [Path(n).expanduser() for n in named if isinstance(n, str) and is_path(n)]
    files = [path for folder in folders for path in folder.glob("adapter_model.*")]
    adapters = {str(path.parent): f"sha256:{sha256(path)}" for path in files}
    return {"data": data, "base": base.revision, "adapters": adapters}


def _tell_skipped(rows: Rows) -> None:
    for why in rows.skipped:
        log.info("skipped: %s", why)
    if rows.skipped:
        text = "%d rows were skipped (data.on_error=skip), the first: %s; run.log lists them"
        log.warning(text, len(rows.skipped), rows.skipped[0])


def _tokens(
    rows: Rows, base: Base, adapted: Adapted, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    """Prepare rows as the algorithm's trainer takes them."""
    args, shape = cfg.algorithm.args, cfg.algorithm.shape
    context = getattr(base.model.config, "max_position_embeddings", None) or math.inf
    if (args.get("max_length") or 0) > context:
        text = f"{args.max_length} is longer than the model's context of {context} tokens"
        raise ConfigError([("algorithm.args.max_length", text)])
    if rows.chat_template is not None:
        base.tokenizer.chat_template = rows.chat_template
    context -= virtual_tokens(adapted.model)
    splits = {"train": rows.train, "eval": rows.eval}
    if shape == "prompt":
        room = context - args.max_completion_length
        made = {
            what: prompts(some, base.tokenizer, room, what) for what, some in splits.items() if some
        }
    elif shape != "completion":
        made = {what: raw(some, shape, base.tokenizer) for what, some in splits.items() if some}
    else:
        cut = args.get("packing") and args.get("packing_strategy") in ("wrapped", "bfd_split")
        room = min(args.max_length or math.inf, context)
        options: dict[str, Any] = {
            "max_length": None if cut or room == math.inf else int(room),
            "completion_only": bool(args.get("completion_only_loss")),
            "separate": cfg.algorithm.task_type == "SEQ_2_SEQ_LM",
        }
        made = {
            what: tokenise(some, base.tokenizer, what=what, **options)
            for what, some in splits.items()
            if some
        }
    return made["train"], made.get("eval")


def _seen(
    trainer: Any, cfg: DictConfig, train: Tokens, held_out: Tokens | None
) -> tuple[Tokens, Tokens | None]:
    """Return the rows as the trainer holds them: some trainers tokenise for themselves."""
    if cfg.algorithm.shape in ("completion", "prompt"):
        return train, held_out
    length = cfg.algorithm.args.max_length
    train = seen(train, trainer.train_dataset, length, "train")
    return train, held_out and seen(held_out, trainer.eval_dataset, length, "eval")


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


def _train(trainer: Any, resume: str | None, record: Record) -> None:
    checkpoint, first = _checkpoint(record, resume)
    if checkpoint and record.values["choices"]["peft"] == "adalora":
        text = "adalora moves its ranks, and its checkpoints do not hold all that takes"
        raise ConfigError([("resume", f"{text}; start a new run")])
    started = time.perf_counter()
    with stop.until_a_step_ends():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    if not math.isfinite(output.training_loss):
        raise DivergedError(f"the training loss ended as {output.training_loss}")
    check_finite(trainer.model.named_parameters(), trainer.state.global_step)
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


def _checkpoint(record: Record, resume: str | None) -> tuple[str | None, int]:
    """Return the newest whole checkpoint of a run that goes on, and its step; later lines go."""
    if not resume:
        return None, 0
    found, step = newest(record.directory / "checkpoints", record.values["tracking_id"])
    if found is None:
        log.warning("resume: %s has no checkpoint yet; training starts anew", record.directory)
    record.rewind(step)
    show(f"goes on from step {step}")
    return str(found) if found else None, step
