"""Each process of a run draws numbers of its own while it trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_exp.parallel.world import world
from lora_exp.training.draws import OwnDraws


def drawn(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(world, "rank", rank)
    monkeypatch.setattr(world, "size", size)
    torch.manual_seed(7)
    OwnDraws().on_train_begin(SimpleNamespace(seed=7), None, None)
    return float(torch.rand(()))


def test_only_the_first_process_draws_what_one_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = drawn(0, 1, monkeypatch)
    assert drawn(0, 2, monkeypatch) == alone
    assert drawn(1, 2, monkeypatch) != alone
