"""The line that every run follows: config, base, adapter, rows, trainer, artifacts.

Only this module knows all stages; numbers flow outward, the config is read-only.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from transformers import TrainerCallback, set_seed

from lora_exp.adapter import AdaLora, Adapted, GradientCheck, attach, save
from lora_exp.card import model_card
from lora_exp.config import build, plain, run_dir
from lora_exp.data import Rows
from lora_exp.display import TrainingBar, quiet
from lora_exp.errors import DivergedError
from lora_exp.model import Base, device, dtype_of
from lora_exp.record import Record
from lora_exp.redaction import redact
from lora_exp.samples import Sample, answer, exact_match
from lora_exp.signature import signature
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


def run(cfg: DictConfig, directory: str | Path | None = None, sweep: str | None = None) -> Result:
    """Train what a validated config describes, and save it.

    Args:
        cfg: from `compose`.
        directory: the run's; null makes one under outputs/, or takes the one that it resumes.
        sweep: the sweep's name, which groups its runs.

    Raises:
        LoraExpError: what the user can mend, by name and place.
        DivergedError: the loss stopped being finite.
    """
    quiet()
    record = Record(Path(directory or run_dir(cfg.resume)), cfg)
    with record.outcome():
        return _run(cfg, record, sweep)


def _run(cfg: DictConfig, record: Record, sweep: str | None) -> Result:
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rows: Rows = build(cfg, "data")
    set_seed(cfg.seed)
    base: Base = build(cfg, "model", quantization=build(cfg, "quant"))
    adapted = attach(base, cfg, record.directory)
    train, held_out = _tokens(rows, base, cfg)
    record.update(counts=counts(adapted, train, held_out), base=base.revision, data=rows.source)
    announce(cfg, rows, base, adapted, train, held_out)
    tracker = _tracker(cfg, record, sweep)
    bar = TrainingBar()
    saved = None
    try:
        trainer = _trainer(
            cfg, base, adapted, train, held_out, record, [Metrics(record, tracker), bar]
        )
        samples = _before(cfg, trainer, base, rows, record)
        set_seed(cfg.seed)  # the training's random numbers do not depend on what was measured
        _train(trainer, cfg.resume, record)
        samples = _after(cfg, trainer, base, rows, record, samples)
        folder = record.directory / ("adapter" if adapted.method else "model")
        save(adapted, base, folder, model_card(cfg, base, rows, record.values))
        saved = folder
        tracker.samples(samples, trainer.state.global_step)
        record.update(metrics={"seconds": time.perf_counter() - started})
    finally:
        bar.close()
        tracker.finish(record.summary(), saved)
    metrics = record.values["metrics"]
    objective = cfg.objective if cfg.objective in metrics else "train/loss"
    conclude(record, bar.losses, objective, tracker.place, saved)
    return Result(metrics[objective], metrics, record.directory, saved)


def _tokens(rows: Rows, base: Base, cfg: DictConfig) -> tuple[Tokens, Tokens | None]:
    args = cfg.algorithm.args
    if rows.chat_template is not None:
        base.tokenizer.chat_template = rows.chat_template
    splits = args.packing and args.get("packing_strategy") in ("wrapped", "bfd_split")
    options: dict[str, Any] = {
        "max_length": None if splits else args.max_length,
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
        settings["bf16"] = _bf16(cfg, base)
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
    if cfg.peft is not None and cfg.peft._target_ == "peft.AdaLoraConfig":
        callbacks = [AdaLora(), *callbacks]
    trainer = build(
        cfg,
        "algorithm.trainer",
        model=adapted.model,
        args=args,
        train_dataset=train.dataset,
        eval_dataset=held_out.dataset if held_out else None,
        processing_class=base.tokenizer,
        callbacks=[FiniteLoss(), GradientCheck(), *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in adapted.model.parameters():
        if (
            adapted.method and parameter.requires_grad
        ):  # trl casts to bfloat16 on quantised bases: docs/decisions/0003
            parameter.data = parameter.data.float()
    return trainer


def _bf16(cfg: DictConfig, base: Base) -> bool:
    """Compute in bfloat16 what is held in few bits, and whole float32 weights where a GPU can."""
    whole = cfg.peft is None and dtype_of("auto") == torch.bfloat16
    return whole or cfg.quant is not None or base.model.dtype == torch.bfloat16


def _tracker(cfg: DictConfig, record: Record, sweep: str | None) -> Tracker:
    tracker: Tracker | None = build(
        cfg,
        "tracking",
        directory=record.directory,
        run_id=record.values["tracking_id"],
        name=cfg.name,
        sweep=sweep,
        job_type=cfg.choices.get("algorithm", "run"),
        tags=[f"{group}={option}" for group, option in cfg.choices.items()],
        config=redact(plain(cfg)),
    )
    return tracker or Nowhere()


def _before(cfg: DictConfig, trainer: Any, base: Base, rows: Rows, record: Record) -> list[Sample]:
    """Measure the base's held-out loss and answers; a resumed run has them on file."""
    if cfg.resume and (samples := record.samples()):
        return [Sample(**sample) for sample in samples]
    metrics, answers = _measure("before", cfg, trainer, base, rows)
    record.update(metrics={f"before/{name}": value for name, value in metrics.items()})
    record.keep_samples([asdict(sample) for sample in answers])
    return answers


def _after(
    cfg: DictConfig, trainer: Any, base: Base, rows: Rows, record: Record, before: list[Sample]
) -> list[Sample]:
    metrics, answers = _measure("after", cfg, trainer, base, rows)
    record.update(metrics={f"eval/{name}": value for name, value in metrics.items()})
    pairs = zip(before, answers, strict=True)
    samples = [replace(old, after=new.before) for old, new in pairs]
    record.keep_samples([asdict(sample) for sample in samples])
    return samples


def _measure(
    when: str, cfg: DictConfig, trainer: Any, base: Base, rows: Rows
) -> tuple[dict[str, float], list[Sample]]:
    seen = named(trainer.evaluate()) if trainer.eval_dataset is not None else {}
    kept = ("loss", "mean_token_accuracy")
    metrics = {name: seen[f"eval/{name}"] for name in kept if f"eval/{name}" in seen}
    with trainer.compute_loss_context_manager():  # in the precision that the loss is computed in
        answers = answer(trainer.model, base.tokenizer, rows.eval, cfg.samples, when)
    return metrics | exact_match(answers), answers


def _train(trainer: Any, resume: str | None, record: Record) -> None:
    started = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=_newest(record, resume))
    seconds = time.perf_counter() - started
    if not math.isfinite(output.training_loss):
        raise DivergedError(f"the training loss ended as {output.training_loss}")
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = max((entry.get("num_tokens", 0) for entry in history), default=0)
    record.update(
        steps=trainer.state.global_step,
        metrics={
            "train/loss": losses[-1] if losses else output.training_loss,
            "train/seconds": seconds,
            "train/steps_per_s": trainer.state.global_step / seconds,
            "train/tokens_per_s": tokens / seconds,
            "peak_bytes": float(peak_bytes()),
        },
    )


def _newest(record: Record, resume: str | None) -> str | None:
    """Return the newest checkpoint of a run that goes on, its later log lines dropped."""
    if not resume:
        return None
    found = list((record.directory / "checkpoints").glob("checkpoint-*"))
    steps = {int(path.name.rpartition("-")[2]): path for path in found}
    if not steps:
        log.warning("resume: %s has no checkpoint yet; training starts anew", record.directory)
    record.rewind(max(steps, default=0))
    return str(steps[max(steps)]) if steps else None


def peak_bytes() -> int:
    """Return the most memory held so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stop at the first log line whose loss or gradient norm is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Check one line.

        Raises:
            DivergedError: naming the step and the number.
        """
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergedError(
                    f"{name} is {logs[name]} at step {state.global_step}; try a lower"
                    " train.learning_rate, more train.warmup_steps or another quant.compute_dtype"
                )
