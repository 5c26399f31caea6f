"""The trainer is the algorithm's own, built from the config and spared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from trl.trainer.utils import RepeatSampler

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.data.examples import raw
from lora_exp.data.rows import Rows
from lora_exp.errors import ConfigError
from lora_exp.record.run import Record
from lora_exp.training.averages import Averages
from lora_exp.training.checkpoint import Checkpoints
from lora_exp.training.trainer import _resumable, trainer_of

PAIR = {"prompt": "q ", "chosen": "a", "rejected": "b"}


def made(base: Any, folder: Path, *words: str) -> Any:
    cfg = compose("tracking=none", *words)
    rows = Rows([PAIR] * 4, [], "preference", {}, None)
    adapted = attach(base, cfg, folder)
    data = raw(rows.train, "preference", base.tokenizer), None
    return trainer_of(cfg, base, adapted, rows, data, Record(folder, cfg), [])


def test_it_is_trls_own_and_its_adapter_is_in_float32(fresh_base: Any, tmp_path: Path) -> None:
    trainer = made(fresh_base, tmp_path / "run", "algorithm=dpo", "algorithm.args.beta=0.3")
    assert type(trainer).__bases__ == (Checkpoints, Averages, trl.DPOTrainer)
    assert trainer.args.beta == 0.3
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_training_every_weight_holds_a_frozen_copy_for_reference(
    fresh_base: Any, tmp_path: Path
) -> None:
    trainer = made(fresh_base, tmp_path / "run", "algorithm=dpo", "peft=none")
    for own, kept in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(own, kept)
        assert own.data_ptr() != kept.data_ptr()
        assert not kept.requires_grad


def test_what_a_trainer_refuses_is_a_fault_of_the_config(fresh_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="algorithm"):
        made(fresh_base, tmp_path / "run", "algorithm=kto", "train.per_device_train_batch_size=1")


def test_any_epoch_of_prompts_begins_in_trls_own_order() -> None:
    def sampler() -> Any:
        return RepeatSampler(range(12), 1, batch_size=3, repeat_count=2, seed=7)

    whole = sampler()
    epochs = [list(whole) for _ in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    for epoch in (2, 0, 1):  # as a process that goes on there
        fresh = _resumable(sampler)()
        fresh.set_epoch(epoch)
        assert list(fresh) == epochs[epoch]
