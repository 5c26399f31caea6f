"""Each process has its own file of the optimizer's state, which is not taken from another."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.errors import CheckpointError
from lora_exp.parallel.world import world
from lora_exp.training.fsdp import Fsdp


def test_a_missing_share_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optimizer.pt").touch()  # the first process's
    monkeypatch.setattr(world, "rank", 2)
    trainer = Fsdp()
    trainer._load_optimizer_and_scheduler(None)
    with pytest.raises(CheckpointError, match=r"optimizer-2\.pt is missing; start a new run"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
