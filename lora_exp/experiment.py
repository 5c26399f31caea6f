"""The stages of every run, in their order: what it needs, its trainer, training, what is saved.

The config is read-only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import set_seed

from lora_exp.adapter.attach import Adapted, save
from lora_exp.adapter.updates import norms
from lora_exp.algorithm.critic import save_value
from lora_exp.config.door import build
from lora_exp.config.learning import check_rows
from lora_exp.config.processes import process_count
from lora_exp.config.settled import run_dir
from lora_exp.config.sharding import shares_all
from lora_exp.config.trackers import sent_config, tracker_keys
from lora_exp.data.examples import recounted
from lora_exp.data.template import template_hash
from lora_exp.errors import AdapterError, Interrupted
from lora_exp.files.redaction import redact
from lora_exp.files.whole import whole
from lora_exp.model.determinism import explained, switched
from lora_exp.model.loading import Base
from lora_exp.model.sharded import gathered
from lora_exp.parallel.launch import check_single_process
from lora_exp.parallel.world import world
from lora_exp.record.card import model_card
from lora_exp.record.clock import Clock
from lora_exp.record.follower import opened
from lora_exp.record.metrics import Metrics
from lora_exp.record.progress import Progression, quiet
from lora_exp.record.run import Record, status_after
from lora_exp.record.summary import announce, conclude, counts
from lora_exp.tracking.several import Several
from lora_exp.tracking.tracker import RunInfo
from lora_exp.training.best import best_evaluation
from lora_exp.training.early_stopping import EarlyStopping
from lora_exp.training.flattened import check_flattened
from lora_exp.training.interruption import stop
from lora_exp.training.loop import train_to_end
from lora_exp.training.measure import after, before, objective_name, present
from lora_exp.training.place import Alone, Place
from lora_exp.training.preparation import prepared
from lora_exp.training.processes import train_in_processes
from lora_exp.training.trainer import precision, tokens_trained, trainer_of

log = logging.getLogger("lora_exp")


@dataclass(frozen=True)
class Result:
    """What a run returns."""

    objective: float
    metrics: dict[str, float]
    directory: Path
    saved: Path | None  # None: the run was stopped early, and `early_stopping.keep` is false


def run(
    cfg: DictConfig,
    directory: str | Path | None = None,
    sweep: str | None = None,
    place: Place | None = None,
    day: date | None = None,
) -> Result:
    """Train what a validated config describes, and save it.

    Args:
        cfg: from `compose`.
        directory: the run's; None: the one that it resumes, or a new one in outputs/.
        sweep: the sweep's name, which groups its runs.
        place: where it trains; None: alone in this process.
        day: that chat templates write as today's; None: today, or of a resumed run its first day.

    Raises:
        LoraExpError: config, data or files cannot be used; the message names what to change.
        DivergedError: the loss is no longer finite.
        Interrupted: SIGTERM or Ctrl-C; `resume` continues the run.
    """
    quiet()
    place, directory = place or Alone(), Path(directory or run_dir(cfg.resume))
    with stop.listening():
        if world.size == 1:
            check_single_process()
            if process_count(cfg) > 1:
                return Result(**train_in_processes(cfg, directory, sweep, day))
        stop.check()
        with switched(cfg.deterministic, cfg.batch_invariant):
            record = opened(directory, cfg, day)
            try:
                with record.outcome(), explained():
                    return _run(cfg, record, sweep, place)
            finally:
                place.leave()


def _run(cfg: DictConfig, record: Record, sweep: str | None, place: Place) -> Result:
    started = place.seconds()
    ready = prepared(cfg, record, place)
    base, data, measured = ready.base, ready.data, ready.measured
    tracker = _tracker(cfg, record, sweep)
    board, clock, saved = place.board(), Clock(place.seconds), None
    try:
        progress = Progression(board, clock, cfg.algorithm.metrics)
        callbacks = [Metrics(record, tracker, clock), progress]
        trainer = trainer_of(cfg, base, ready.adapted, ready.shaped, data, record, callbacks)
        train, held_out = recounted(*data, trainer, cfg)
        check_rows(cfg, len(trainer.train_dataset), packed=True)
        check_flattened(trainer, base.model)
        _connect(clock, trainer)
        adapted = replace(ready.adapted, trainable=_trainable(trainer.model))  # PPO adds a critic
        numbers = counts(adapted, train, held_out) | {"rows_skipped": len(ready.rows.skipped)}
        facts = _facts(cfg, base, trainer)
        record.update(place=place.name, counts=numbers, **facts, **ready.hashes)
        tracker.describe(record.facts())
        announce(cfg, ready.rows, base, adapted, train, held_out)
        place.join(trainer)
        samples = before(cfg, trainer, base, measured, record, place)
        objective = objective_name(cfg.objective, record.values["metrics"], held_out)
        measure = partial(present, objective, cfg, trainer, base, measured)
        stopping = EarlyStopping(cfg, record, place, objective, measure).joined(trainer)
        set_seed(cfg.seed)  # training draws the same numbers, whatever was measured
        train_to_end(trainer, cfg.resume, record, clock)
        with _checkpoint_if_interrupted(trainer):
            samples = stopping.conclude(trainer, samples)
            if not stopping.prunes:
                samples = after(cfg, trainer, base, measured, record, samples)
            if world.size > 1:  # where one process was asked, all agree here
                stop.check()
            if not stopping.prunes or stopping.keeps:
                saved = _save_artifacts(cfg, trainer, adapted, base, record)
            tracker.samples(samples, trainer.state.global_step)
            _record_result(cfg, record, trainer, objective, place.seconds() - started)
            ended = record.ends_as
    except BaseException as error:
        ended = status_after(error)
        raise
    finally:
        board.close()
        tracker.finish(record.summary(), saved, ended)
        if report := place.report():
            record.update(**report)
    metrics = record.values["metrics"]
    conclude(record, objective, tracker.places, saved)
    return Result(metrics[objective], metrics, record.directory, saved)


def _facts(cfg: DictConfig, base: Base, trainer: Any) -> dict[str, Any]:
    """Return what the record says of the base, and of how it is computed."""
    dtypes, template = precision(cfg, base, trainer), template_hash(base.tokenizer)
    return base.facts | {
        "precision": dtypes, "template": template, "processes": world.size,
        "deterministic": cfg.deterministic, "batch_invariant": cfg.batch_invariant,
    }  # fmt: skip


def _connect(clock: Clock, trainer: Any) -> None:
    """Let a clock count the trainer's tokens, and leave out the time of evaluations."""
    clock.count = partial(tokens_trained, trainer)
    trainer.evaluate = clock.without(trainer.evaluate)


def _trainable(model: Any) -> int:
    return int(sum(p.numel() for p in model.parameters() if p.requires_grad))


def _record_result(
    cfg: DictConfig, record: Record, trainer: Any, objective: str, seconds: float
) -> None:
    goal = cfg.goal if objective == cfg.objective else "minimize"  # else it is a loss
    values = {"objective": objective, "goal": goal, "best": best_evaluation(trainer)}
    record.update(**values, metrics={"seconds": seconds})


def _save_artifacts(
    cfg: DictConfig, trainer: Any, adapted: Adapted, base: Base, record: Record
) -> Path:
    """Write what was trained, each folder completely or not at all."""
    folder = record.directory / ("adapter" if adapted.method else "model")
    weights = gathered(adapted.model) if shares_all(cfg) else None
    if not world.is_first:
        return folder
    if hasattr(trainer.model, "ppo_value"):
        with whole(record.directory / "value") as staged:
            save_value(trainer.model, base, staged)
    with whole(folder) as staged:
        save(adapted, base, staged, model_card(cfg, record.values), weights)
    if adapted.method:
        try:
            record.write_json("updates.json", norms(folder))
        except AdapterError as error:  # what was trained is saved all the same
            log.warning("updates.json is left out: %s", error)
    return folder


@contextmanager
def _checkpoint_if_interrupted(trainer: Any) -> Iterator[None]:
    """Save a checkpoint if what follows training is interrupted: the training is not lost."""
    try:
        yield
    except Interrupted:
        trainer.ensure_checkpoint()
        raise


def _tracker(cfg: DictConfig, record: Record, sweep: str | None) -> Several:
    config: dict[str, Any] = redact(sent_config(cfg))
    keys = tracker_keys(cfg.tracking) if world.is_first else ()
    info = RunInfo(
        record.directory,
        id=record.values["tracking_id"],
        name=cfg.name,
        sweep=cfg.get("sweep_name") or sweep,
        algorithm=cfg.choices.algorithm,
        choices=[f"{group}={option}" for group, option in config["choices"].items()],
        config=config | {"sweep": sweep},
    )

    def make(key: str) -> Any:
        return build(cfg, f"tracking.{key}".rstrip("."), leave_out=keys, run=info)

    return Several({key or "wandb": partial(make, key) for key in keys})
