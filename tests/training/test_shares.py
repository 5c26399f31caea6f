"""Each process has its own file of the optimizer's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.errors import CheckpointError
from lora_exp.parallel.world import world
from lora_exp.training.shares import Shares


class Second(Shares):
    """A trainer of the second process."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = torch.tensor(numbers)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def share(self) -> dict[str, Any]:
        """Return the numbers."""
        return {"numbers": self.numbers}

    def take_share(self, saved: dict[str, Any]) -> None:
        """Take them back."""
        self.numbers = saved["numbers"]


def test_a_process_gets_its_own_share_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Second([1.0])
    first.lr_scheduler.last_epoch = 5
    first._save_optimizer_and_scheduler(str(tmp_path))
    monkeypatch.setattr(world, "rank", 1)
    Second([2.0, 3.0])._save_optimizer_and_scheduler(str(tmp_path))
    again = Second([])
    again._load_optimizer_and_scheduler(str(tmp_path))
    assert again.numbers.tolist() == [2.0, 3.0]
    assert again.lr_scheduler.last_epoch == 5
    again._load_optimizer_and_scheduler(None)
    monkeypatch.setattr(world, "rank", 2)
    with pytest.raises(CheckpointError, match=r"optimizer-2\.pt is missing; start a new run"):
        again._load_optimizer_and_scheduler(str(tmp_path))
