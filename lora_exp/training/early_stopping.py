"""A run is measured at rungs and evaluations, and ends early where its rule says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback

from lora_exp.config.door import build
from lora_exp.config.keep import goal_of
from lora_exp.config.stopping import warm_up_problem
from lora_exp.early_stopping.rules import Comparing, Patience, Rule
from lora_exp.early_stopping.rungs import reported_value, rung_steps
from lora_exp.errors import ConfigError, Paused
from lora_exp.record.run import Record
from lora_exp.training.best import Watched
from lora_exp.training.interruption import stop
from lora_exp.training.place import Place

log = logging.getLogger("lora_exp")


@dataclass(frozen=True)
class Stopped:
    """Where and why a run ended early; it becomes `stopped` of its record."""

    rule: str
    step: int
    value: float
    reason: str


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """What `early_stopping` asks of one run; without a rule it does nothing."""

    def __init__(
        self,
        cfg: DictConfig,
        record: Record,
        place: Place,
        objective: str,
        measure: Callable[[], dict[str, float]],
    ) -> None:
        """Create it for one run.

        Args:
            cfg: the run's.
            record: the run's; reports and verdicts are written to it.
            place: where the run trains: it may know the jobs to compare it with.
            objective: the name of the metric that jobs are compared by.
            measure: returns metrics of the present weights, with that one; it changes nothing.
        """
        self.rule: Rule | None = build(cfg, "early_stopping")
        self.name = str(cfg.choices.get("early_stopping"))
        self.record, self.place, self.objective, self.measure = record, place, objective, measure
        objective_name = str(cfg.objective).removeprefix("eval/")
        name = str(getattr(self.rule, "metric", None) or objective_name).removeprefix("eval/")
        goal = cfg.goal if name == objective_name else goal_of(f"eval/{name}")
        self.watched = Watched(name, goal != "minimize")
        self.warmup_steps = cfg.train.warmup_steps
        self.stopped: Stopped | None = None
        self.keeps = False  # a loser's adapter and a checkpoint
        self._saved_step: int | None = record.values.get("saved_step")
        self._measured: dict[int, dict[str, Any]] = {}  # reports of this process, by step

    def joined(self, trainer: Any) -> EarlyStopping:
        """Act on a trainer from here on.

        Raises:
            ConfigError: the run has no held-out rows to be measured on.
        """
        if self.rule is not None and trainer.eval_dataset is None:
            text = "measures held-out rows, and there are none; data.eval_path or data.eval_share"
            raise ConfigError([("early_stopping", f"{text} gives some")])
        trainer.add_callback(self)
        trainer.early_stopping = self
        return self

    @property
    def prunes(self) -> bool:
        """Return whether the run was stopped as a loser; a run out of patience is finished."""
        return self.stopped is not None and not isinstance(self.rule, Patience)

    @property
    def saved_before(self) -> int | None:
        """Return the step of weights that an earlier, shorter training has saved, if there are."""
        folders = [self.record.directory / name for name in ("adapter", "model")]
        return self._saved_step if any(folder.is_dir() for folder in folders) else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the first rung, now that the number of steps is known.

        Raises:
            ConfigError: it is inside the warm-up.
        """
        if isinstance(self.rule, Comparing):
            first = self.rule.shares()[0]
            if problem := warm_up_problem(first, self.warmup_steps, state.max_steps):
                raise ConfigError([("early_stopping.first_rung", problem)])

    def resumed(self, trainer: Any, state: Any, steps: int) -> bool:
        """Report the rungs that a resumed run has passed; return whether the run stops there.

        Args:
            trainer: the run's.
            state: the checkpoint's.
            steps: of the whole training.

        Raises:
            Paused: other jobs have not reached one of the rungs yet.
        """
        before, trainer.state = trainer.state, state
        try:
            return self._resumed(trainer, steps)
        finally:
            trainer.state = before

    def _resumed(self, trainer: Any, steps: int) -> bool:
        step = trainer.state.global_step
        for rung, rung_step in enumerate(self._rungs(steps)):
            if rung_step > step or self.stopped is not None:
                break
            report = self._reported(rung, rung_step, steps)
            if report is None:  # it was trained this far without rungs, or with others
                report = {"rung": rung, "step": rung_step, "steps": steps, "measured": False}
                self._record(report, {})
            self._judge(trainer, report)
        if self.stopped is None:
            self._evaluated(trainer)
        return self.stopped is not None

    def measure_at_rung(self, trainer: Any) -> None:
        """Measure the present weights if this step is a rung, and record the report.

        Called before a checkpoint is saved: so a run that resumes from one has reported its rung.
        """
        state = trainer.state
        for rung, step in enumerate(self._rungs(state.max_steps)):
            if step == state.global_step and step not in self._measured:
                metrics = self.measure()
                value = metrics[self.objective]
                report = {"rung": rung, "step": step, "steps": state.max_steps, "value": value}
                self._record(report, metrics)
                self._measured[step] = report

    def step_ended(self, trainer: Any) -> None:
        """Compare at a rung, or look at a new evaluation; the trainer may stop.

        Raises:
            Paused: other jobs have not reached the rung yet, and cannot while this one waits.
        """
        self.measure_at_rung(trainer)
        report = self._measured.get(trainer.state.global_step)
        if report is not None:
            self._judge(trainer, report)
        if self.stopped is None:
            self._evaluated(trainer)
        if self.stopped is not None:
            trainer.control.should_training_stop = True
        if self.prunes:  # a loser's last weights are those that were compared
            trainer.args.load_best_model_at_end = False

    def _rungs(self, steps: int) -> list[int]:
        is_compared = isinstance(self.rule, Comparing) and self.place.bracket is not None
        return rung_steps(self.rule.shares(), steps) if is_compared else []  # type: ignore[union-attr]

    def _reported(self, rung: int, step: int, steps: int) -> dict[str, Any] | None:
        """Return what the run reported at a rung before it was interrupted."""
        for report in self.record.values.get("rungs", []):
            if (report["rung"], report["step"], report["steps"]) == (rung, step, steps):
                return dict(report)
        return None

    def _record(self, report: dict[str, Any], metrics: dict[str, float]) -> None:
        reports = {r["rung"]: r for r in self.record.values.get("rungs", [])}
        reports[report["rung"]] = report
        self.record.update(rungs=[reports[rung] for rung in sorted(reports)], metrics=metrics)

    def _judge(self, trainer: Any, report: dict[str, Any]) -> None:
        """Compare the run with the others of its bracket, and wait for them if need be."""
        bracket, job = self.place.bracket, self.place.job
        assert bracket is not None
        rung, step, value = report["rung"], report["step"], reported_value(report)
        bracket.report(job, rung, value)
        verdict = bracket.verdict(job, rung)
        if verdict is None:
            self.place.wait_for(lambda: bracket.verdict(job, rung) is not None)
            verdict = bracket.verdict(job, rung)
        if verdict is None:
            if step == trainer.state.global_step:
                trainer.ensure_checkpoint()
            stop.check()
            raise Paused(f"waits at step {step} for other jobs of its sweep")
        if value is None:
            return
        self._record(report | {"rank": verdict.rank, "of": verdict.of}, {})
        log.info("rung %d at step %d: %d of %d", rung, step, verdict.rank, verdict.of)
        if not verdict.survives:
            reason = f"{verdict.rank} of {verdict.of} at step {step}"
            self.stopped = Stopped(self.name, step, value, reason)

    def _evaluated(self, trainer: Any) -> None:
        """Apply a rule about evaluations to those up to now."""
        if self.rule is None or isinstance(self.rule, Comparing):
            return
        key = f"eval_{self.watched.name}"
        values = [(e["step"], e[key]) for e in trainer.state.log_history if e.get(key) is not None]
        evaluations = [(step, value) for step, value in values if step]
        if not evaluations or evaluations[-1][0] != trainer.state.global_step:
            return
        step, value = evaluations[-1]
        if isinstance(self.rule, Patience):
            sign = -1 if self.watched.maximize else 1
            reason = self.rule.reason([(s, sign * v) for s, v in evaluations])
        else:
            reason = self.rule.reason(step, value)
        if reason:
            self.stopped = Stopped(self.name, step, float(value), reason)

    def conclude(self, trainer: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Record where and why the training ended early, if it did.

        Args:
            trainer: it has ended.
            samples: the run's.

        Returns:
            The samples; a loser's have no answers after its training.
        """
        if self.stopped is None:
            return samples
        self.record.update(stopped=asdict(self.stopped))
        if not self.prunes:
            return samples
        self.record.ends_as = "pruned"
        if isinstance(self.rule, Comparing):
            self.record.update(metrics={self.objective: self.stopped.value})
        elif self.objective != "train/loss":
            self.record.update(metrics=self.measure())
        # of a rung before the checkpoint that it resumed from, there are no weights any more
        holds_weights = self.stopped.step == trainer.state.global_step
        self.keeps = bool(getattr(self.rule, "keep", False)) and holds_weights
        if self.keeps:
            trainer.ensure_checkpoint()
        else:
            self.record.update(saved_step=self.saved_before)
        samples = [sample | {"after": None} for sample in samples]
        self.record.write_samples(samples)
        return samples
