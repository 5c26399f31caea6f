"""The training itself: from the start or the newest checkpoint to the last step."""

from __future__ import annotations

import logging
import math
from typing import Any

from lora_exp.errors import ConfigError, DivergedError
from lora_exp.model.memory import peak_bytes
from lora_exp.parallel.world import world
from lora_exp.record.clock import Clock
from lora_exp.record.console import print_and_log
from lora_exp.record.run import Record
from lora_exp.training.best import saved_step
from lora_exp.training.guards import check_alike, check_finite, check_stepped
from lora_exp.training.interruption import stop
from lora_exp.training.manifest import newest

log = logging.getLogger("lora_exp")


def train_to_end(trainer: Any, resume: str | None, record: Record, clock: Clock) -> None:
    """Train, and record the steps, the loss and the speed.

    Args:
        trainer: the run's.
        resume: the run's directory, if it goes on from its newest checkpoint.
        record: the run's.
        clock: counts the tokens, and the seconds without those of evaluations.

    Raises:
        ConfigError: adalora cannot resume, or no step was made.
        DivergedError: the loss or a trained tensor is not finite.
        Interrupted: the run was asked to stop, and has a checkpoint.
    """
    checkpoint, first = _checkpoint(record, resume)
    if checkpoint and record.values["choices"]["peft"] == "adalora":
        text = "adalora moves its ranks, and its checkpoints lack a part of that state"
        raise ConfigError([("resume", f"{text}; start a new run")])
    started = clock.now()
    clock.begin()
    with stop.until_a_step_ends():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = clock.seconds  # without evaluations
    check_stepped(trainer.state)
    if not math.isfinite(output.training_loss):
        raise DivergedError(f"the training loss ended as {output.training_loss}")
    check_finite(trainer.model.named_parameters(), trainer.state.global_step)
    check_alike(trainer.model.parameters(), trainer.state.global_step)
    step = saved_step(trainer)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry and entry["step"] <= step]
    record.update(
        steps=trainer.state.global_step,
        saved_step=step,
        metrics={
            "train/loss": losses[-1] if losses else output.training_loss,
            "train/seconds": clock.now() - started,
            "train/steps_per_s": (trainer.state.global_step - first) / seconds,
            "train/tokens_per_s": clock.tokens / seconds,
            "peak_bytes": float(peak_bytes()),
        },
    )


def _checkpoint(record: Record, resume: str | None) -> tuple[str | None, int]:
    """Return a resumed run's newest intact checkpoint, and its step; later metrics are deleted."""
    if not resume:
        return None, 0
    found = None
    if world.is_first:
        found = newest(record.directory / "checkpoints", record.values["tracking_id"])
    checkpoint, step = world.shared(found) or (None, 0)
    if checkpoint is None:
        log.warning("resume: %s has no checkpoint yet; training starts anew", record.directory)
    record.rewind(step)
    print_and_log(f"goes on from step {step}")
    return str(checkpoint) if checkpoint else None, step
