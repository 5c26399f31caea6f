"""Checkpoints of a trainer: complete or absent, the best kept.

Knows trainers' methods, nothing of configs. A checkpoint has what transformers saves, and what it
leaves out: rollouts, the encoders of trained prompts, a reference that is updated, what is not
logged yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from lora_exp.adapter.untrusted import numbers_only
from lora_exp.errors import CheckpointError, Interrupted
from lora_exp.files.whole import whole
from lora_exp.parallel.world import world
from lora_exp.training.averages import Averages
from lora_exp.training.best import Watched
from lora_exp.training.early_stopping import EarlyStopping
from lora_exp.training.guards import check_alike, check_finite
from lora_exp.training.interruption import stop
from lora_exp.training.manifest import PREFIX, flaw, owner, seal
from lora_exp.training.rollouts import load_rollout, save_rollout
from lora_exp.training.rotation import rotate
from lora_exp.training.saved_weights import SavedWeights
from lora_exp.training.unlogged import restore_loss, restore_metrics, save_unlogged

log = logging.getLogger("lora_exp")


class Checkpoints(SavedWeights):
    """A mixin for trainers: complete checkpoints, the best kept, a stop at the end of a step."""

    owner = ""  # the run whose checkpoints these are
    watched = Watched("loss", maximize=False)
    early_stopping: EarlyStopping | None = None
    model: Any
    state: Any
    args: Any
    control: Any
    _stage: Path | None = None
    _saving: Future[None] | None = None  # a checkpoint that is finished beside the next step
    _postponed: int | None = None  # the step whose log, evaluation and save wait for the epoch's
    _holds_best = False  # the model has the best checkpoint's weights, not the last step's

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Train; a checkpoint after which no step is left is only loaded, or one more would run.

        Returns:
            transformers' `TrainOutput`.
        """
        try:
            output = self._train(resume_from_checkpoint, **options)
        except BaseException:
            try:
                self._finish_saving()
            except Exception as error:  # what ended the training matters more
                log.warning("the last checkpoint is not whole: %s", error)
            raise
        self._finish_saving()
        return output

    def _train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        if world.size > 1:
            self._forget_evaluation()
        if resume_from_checkpoint is None:
            return super().train(**options)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        *_, steps = self.set_initial_training_values(self.args, loader)  # type: ignore[attr-defined]
        stops = self.early_stopping and self.early_stopping.resumed(self, state, steps)
        if state.global_step < steps and not stops:
            options["resume_from_checkpoint"] = resume_from_checkpoint
            return super().train(**options)  # type: ignore[misc]
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        self._find_best(folder.parent)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else 0.0, {})

    def _forget_evaluation(self) -> None:
        """Let accelerate prepare the model anew: to train one that it has prepared to evaluate.

        Else it would not wrap the model, and each process would follow its own gradients.
        """
        for model in self.accelerator._models:  # type: ignore[attr-defined]
            model._is_accelerate_prepared = False
            forward = vars(model).pop("_original_forward", None)
            if forward is not None:
                model.forward = forward
        self.accelerator._models.clear()  # type: ignore[attr-defined]

    def ensure_checkpoint(self) -> None:
        """Save a checkpoint of the last step, unless there is one or its weights are gone."""
        self._finish_saving()
        step = self.state.global_step
        saved = owner(Path(self._get_output_dir(None)) / f"{PREFIX}{step}") == self.owner
        if step and not saved and not self._holds_best:
            self._save_checkpoint(self.model, None)
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Wait until the checkpoint that was saved last is whole on the disk.

        Raises:
            CheckpointError: the disk refused it.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Log, evaluate and save once at a step, then stop if a signal has asked for it.

        The loop calls this after a step, and again if the step ends its epoch: a checkpoint of the
        first call would lack the second's evaluation. Its own way to stop would evaluate once more.
        """
        self._finish_saving()
        step, ends = self.state.global_step, (self.state.epoch or 0.5).is_integer()
        ends = ends or self.control.should_epoch_stop or self.control.should_training_stop
        if ends and self._postponed != step:
            self._postponed = step
            return
        super()._maybe_log_save_evaluate(*arguments, **options)  # type: ignore[misc]
        if self.control.should_training_stop:  # next the best is loaded, and others deleted
            self._finish_saving()
        if self.early_stopping is not None:
            self.early_stopping.step_ended(self)
        if stop.agreed():
            self.ensure_checkpoint()
            raise Interrupted

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or super()._get_output_dir(trial))  # type: ignore[misc]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: trl would write a card at every checkpoint; ours comes with the adapter."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save what the next step changes; the rest is done beside that step.

        Hashing and flushing take longer than writing. With several processes all wait for it.
        """
        self._finish_saving()
        step = self.state.global_step
        check_finite(self.model.named_parameters(), step)
        check_alike(self.model.parameters(), step)
        if self.early_stopping is not None:
            self.early_stopping.measure_at_rung(self)
        folder = Path(self._get_output_dir(trial))
        self._find_best(folder)
        with ExitStack() as stack:
            staged = stack.enter_context(_staged(folder / f"{PREFIX}{step}"))
            self._stage = staged.parent
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._stage = None
            save_rollout(self, staged)
            save_unlogged(self, staged)
            is_best = self._find_best(folder, step)
            world.wait()  # until every process has saved its own
            if world.is_first:
                self._save_extra_weights(staged)
                if is_best:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            history, best = [*self.state.log_history], self.state.best_global_step
            finish = partial(self._finish, stack.pop_all(), staged, step, history, best)
        if world.size == 1:
            beside = ThreadPoolExecutor(1, "checkpoint")
            self._saving = beside.submit(finish)
            beside.shutdown(wait=False)
            return
        finish()
        world.wait()

    def _finish(
        self, stack: ExitStack, staged: Path, step: int, history: list[Any], best: int | None
    ) -> None:
        """Seal a staged checkpoint, put it in its place and delete old ones.

        Args:
            stack: of the staged folder.
            staged: the folder.
            step: the checkpoint's.
            history: what was logged up to it.
            best: the step of the best checkpoint by then.
        """
        with stack:
            if world.is_first:
                seal(staged, self.owner, step)
        if world.is_first:
            limit, folder = self.args.save_total_limit, staged.parent.parent
            rotate(folder, self.owner, limit, best, self.watched, history)

    def _find_best(self, folder: Path, step: int | None = None) -> bool:
        """Point the state to the best checkpoint in this folder; return whether it is `step`'s."""
        best = self.state.best_global_step
        path = folder / f"{PREFIX}{best}"
        if best and (best == step or path.is_dir()):  # the run may have been moved
            self.state.best_model_checkpoint = str(path)
        return bool(best) and best == step

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if reason := flaw(best, self.owner):
            raise CheckpointError(f"{best}, the best, {reason}; its weights are not loaded")
        super()._load_best_model()
        self._holds_best = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with numbers_only(checkpoint, CheckpointError):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._find_best(Path(checkpoint).parent)
            load_rollout(self, Path(checkpoint))
            restore_metrics(self, Path(checkpoint))
            self._load_reference(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with numbers_only(checkpoint, CheckpointError):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            restore_loss(self, Path(checkpoint))


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """Yield a checkpoint's temporary folder, the same in all processes of the run."""
    with whole(final) if world.is_first else nullcontext(final) as staged:
        yield world.shared(staged)


@cache
def checkpointed(trainer: type, mixins: tuple[type, ...] = ()) -> type:
    """Return a subclass of a trainer's class, with our mixins first, then further ones."""
    bases = (Checkpoints, Averages, *mixins, trainer)
    return type(trainer.__name__, bases, {"__module__": trainer.__module__})
