"""The trainer is TRL's for the algorithm, built from the config."""

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
from lora_exp.training.preparation import with_reference
from lora_exp.training.trainer import _resumable, trainer_of
from tests.conftest import tiny

PAIR = {"prompt": "q ", "chosen": "a", "rejected": "b"}


def trainer_with(base: Any, folder: Path, *overrides: str) -> Any:
    cfg = compose("tracking=none", *overrides)
    rows = Rows([PAIR] * 4, [], "preference", {}, None)
    adapted = with_reference(cfg, attach(base, cfg, folder))
    data = raw(rows.train, "preference", base.tokenizer), None
    return trainer_of(cfg, base, adapted, rows, data, Record(folder, cfg), [])


def test_the_trainer_is_a_trl_trainer_with_a_float32_adapter(
    fresh_base: Any, tmp_path: Path
) -> None:
    trainer = trainer_with(fresh_base, tmp_path / "run", "algorithm=dpo", "algorithm.args.beta=0.3")
    assert type(trainer).__bases__ == (Checkpoints, Averages, trl.DPOTrainer)
    assert trainer.args.beta == 0.3
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_several_gpus_do_not_share_a_pass(
    fresh_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = property(lambda args: args._n_gpu or 4)  # 0 on a CPU
    monkeypatch.setattr(trl.DPOConfig, "n_gpu", seen)
    trainer = trainer_with(fresh_base, tmp_path / "run", "algorithm=dpo")  # trl refuses 4
    assert trainer.args.n_gpu == 1


def test_full_fine_tuning_keeps_a_frozen_copy_as_reference(fresh_base: Any, tmp_path: Path) -> None:
    trainer = trainer_with(fresh_base, tmp_path / "run", "algorithm=dpo", "peft=none")
    for weight, frozen in zip(
        trainer.model.parameters(), trainer.ref_model.parameters(), strict=True
    ):
        assert torch.equal(weight, frozen)
        assert weight.data_ptr() != frozen.data_ptr()
        assert not frozen.requires_grad


def test_an_error_of_the_trainers_arguments_is_a_config_error(
    fresh_base: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="algorithm"):
        trainer_with(
            fresh_base, tmp_path / "run", "algorithm=kto", "train.per_device_train_batch_size=1"
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has activations to offload")
def test_activations_are_offloaded_from_a_gpu_only(fresh_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"activation_offloading: .* on a CPU"):
        trainer_with(
            fresh_base,
            tmp_path / "run",
            "algorithm=dpo",
            "+algorithm.args.activation_offloading=true",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these gradients")
def test_attention_without_gradients_on_a_cpu_is_refused(tmp_path: Path) -> None:
    base = tiny()
    base.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"attn_implementation: flex_attention has no gradients"):
        trainer_with(base, tmp_path / "run", "algorithm=dpo")


def test_every_epoch_has_trls_order_of_prompts() -> None:
    def sampler() -> Any:
        return RepeatSampler(range(12), 1, batch_size=3, repeat_count=2, seed=7)

    uninterrupted = sampler()
    epochs = [list(uninterrupted) for _ in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    for epoch in (2, 0, 1):  # as a process that resumes there
        resumed = _resumable(sampler)()
        resumed.set_epoch(epoch)
        assert list(resumed) == epochs[epoch]
