"""Which evaluation of a training was the best, and which step's weights are saved."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.keep import goal_of


@dataclass(frozen=True)
class Watched:
    """The metric that decides which evaluation is the best."""

    name: str  # without eval_
    maximize: bool

    @classmethod
    def of(cls, cfg: DictConfig) -> Watched:
        """Return a run's objective, or the first metric that is evaluated during training.

        Exact match and preference accuracy are measured before and after training only.
        """
        configured = cfg.train.get("metric_for_best_model")
        if configured:
            name = str(configured).removeprefix("eval_")
            greater = cfg.train.get("greater_is_better")
            return cls(name, _rises(name) if greater is None else bool(greater))
        name = str(cfg.objective).removeprefix("eval/")
        if name in cfg.algorithm.metrics:
            return cls(name, cfg.goal == "maximize")
        first = str(cfg.algorithm.metrics[0])
        return cls(first, _rises(first))

    def best(
        self, history: list[dict[str, Any]], steps: Container[int] | None = None
    ) -> tuple[int, float] | None:
        """Return the step and the value of the best evaluation, the first of equal ones.

        Args:
            history: a trainer's log lines.
            steps: the steps to choose from; None: all.
        """
        key = f"eval_{self.name}"
        evaluations = [
            (entry["step"], float(entry[key]))
            for entry in history
            if entry.get(key) is not None and entry["step"] and math.isfinite(entry[key])
        ]
        candidates = [pair for pair in evaluations if steps is None or pair[0] in steps]
        if not candidates:
            return None
        return (max if self.maximize else min)(candidates, key=lambda pair: pair[1])


def _rises(name: str) -> bool:
    """Return whether a higher value of a metric is better; of one that is not known, it is."""
    return goal_of(f"eval/{name}") != "minimize"


def saved_step(trainer: Any) -> int:
    """Return the step whose weights a trainer holds after training: the last, or the best."""
    state = trainer.state
    loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return int(state.best_global_step if loaded else state.global_step)


def best_evaluation(trainer: Any) -> dict[str, Any] | None:
    """Return the best evaluation, and where its checkpoint is, for the run's record."""
    evaluation = trainer.watched.best(trainer.state.log_history)
    if evaluation is None:
        return None
    step, value = evaluation
    folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    return {
        "metric": f"eval/{trainer.watched.name}",
        "goal": "maximize" if trainer.watched.maximize else "minimize",
        "value": value,
        "step": step,
        "checkpoint": f"{folder.parent.name}/{folder.name}" if folder.is_dir() else None,
    }
