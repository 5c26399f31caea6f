"""What is gathered between two log lines survives a resume."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_exp.training.unlogged import FILE, restore_loss, restore_metrics, save_unlogged


def trainer_of(loss: float = 0.0, step: int = 0, tokens: int = 0, **metrics: list[float]) -> Any:
    return SimpleNamespace(
        _tr_loss=torch.tensor(loss), _globalstep_last_logged=step, _total_train_tokens=tokens,
        _metrics={"train": defaultdict(list, metrics), "eval": defaultdict(list)},
    )  # fmt: skip


def test_a_trainer_goes_on_with_what_another_has_gathered(tmp_path: Path) -> None:
    save_unlogged(trainer_of(0.1, 4, 900, entropy=[0.3, 0.7]), tmp_path)
    fresh = trainer_of(step=5)
    restore_metrics(fresh, tmp_path)
    restore_loss(fresh, tmp_path)
    fresh._metrics["train"]["accuracy"].append(1.0)  # of a kind that it adds numbers to
    assert (fresh._tr_loss.item(), fresh._globalstep_last_logged) == (torch.tensor(0.1).item(), 4)
    assert fresh._total_train_tokens == 900
    assert fresh._metrics["train"] == {"entropy": [0.3, 0.7], "accuracy": [1.0]}


def test_a_checkpoint_without_it_changes_nothing(tmp_path: Path) -> None:
    fresh = trainer_of(step=5, tokens=7)
    restore_metrics(fresh, tmp_path)
    restore_loss(fresh, tmp_path)
    assert not (tmp_path / FILE).exists()
    assert (fresh._globalstep_last_logged, fresh._total_train_tokens) == (5, 7)
