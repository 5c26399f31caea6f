"""Metrics of an evaluation do not depend on the batch size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.data.examples import prepared
from lora_exp.data.rows import jsonl
from lora_exp.record.run import Record
from lora_exp.training.averages import (
    Averages,
    BatchSizes,
    Dealt,
    combined,
    mean,
    predicts_first,
    world,
)
from lora_exp.training.trainer import trainer_of
from tests.conftest import tiny

LETTERS = "abcdefghijk"
PLAIN = [{"prompt": f"say {c}: ", "completion": f"{c} " * n} for n, c in enumerate(LETTERS, 1)]
PAIRS = [
    {"prompt": f"say {c}: ", "chosen": f"{c} " * n, "rejected": "no" * (12 - n)}
    for n, c in enumerate(LETTERS, 1)
]
MARKED = [
    {"prompt": row["prompt"], "completion": row["completion"], "label": n % 3 != 0}
    for n, row in enumerate(PLAIN)
]
CASES = {
    "sft": (PLAIN, []),
    "sft of all tokens": (PLAIN, ["algorithm.args.completion_only_loss=false"]),
    "sft in whole batches": (PLAIN, ["+train.dataloader_drop_last=true"]),  # of training rows
    "pretrain": (PLAIN, ["algorithm=pretrain", "algorithm.args.packing=false"]),
    "p_tuning": (PLAIN, ["peft=p_tuning", "algorithm.args.completion_only_loss=false"]),
    "dpo": (PAIRS, ["algorithm=dpo"]),
    "kto": (MARKED, ["algorithm=kto", "+algorithm.args.loss_type=apo_zero_unpaired"]),
    "reward": (PAIRS, ["algorithm=reward"]),
}


def trainer_on(base: Any, folder: Path, rows: list[Any], *overrides: str) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose("tracking=none", *overrides)
    rows_read = jsonl(
        str(path), eval_path=str(path), eval_share=0.0, format="auto", max_rows=None,
        max_eval_rows=None, chat_template=None, on_error="raise",
    ).shaped(cfg.algorithm.shape)  # fmt: skip
    torch.manual_seed(0)  # an adapter's initial weights are random
    adapted = attach(base, cfg, folder)
    data = prepared(rows_read, base.tokenizer, adapted.model, cfg)
    trainer = trainer_of(cfg, base, adapted, rows_read, data, Record(folder / "run", cfg), [])
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():  # as if the adapter were trained
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return trainer


def evaluate(trainer: Any, rows: int) -> dict[str, float]:
    trainer.args.per_device_eval_batch_size = rows
    metrics: dict[str, float] = dict(trainer.evaluate())
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "second", "time"))}


def losses_of(trainer: Any) -> dict[str, float]:
    rows = trainer.row_losses[0]
    return dict(zip(rows.rows, rows.losses, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_metrics_do_not_depend_on_the_batch(fresh_base: Any, tmp_path: Path, case: str) -> None:
    rows, overrides = CASES[case]
    overrides = [*overrides, "algorithm=sft"] if case in ("sft", "p_tuning") else overrides
    base = tiny(task_type="SEQ_CLS") if case == "reward" else fresh_base
    trainer = trainer_on(base, tmp_path, rows, *overrides)
    one_batch = evaluate(trainer, len(rows))
    assert math.isfinite(one_batch["eval_loss"])
    by_row = trainer.row_losses[0]
    if case in ("dpo", "kto", "reward"):
        assert by_row.rows == []
    else:
        assert len(set(by_row.rows)) == len(rows)
        mean_loss = sum(by_row.losses) / sum(by_row.tokens)
        assert mean_loss == pytest.approx(one_batch["eval_loss"], rel=1e-5)
    for size in (1, 3, 4):
        batches = evaluate(trainer, size)
        shared = one_batch.keys() - {"eval_kl"}
        assert {key: batches[key] for key in shared} == pytest.approx(
            {key: one_batch[key] for key in shared}, rel=1e-4, abs=1e-5
        ), size


def test_packed_rows_have_the_metrics_of_separate_rows(tmp_path: Path) -> None:
    apart = trainer_on(tiny(), tmp_path, PLAIN)
    expected, by_row = evaluate(apart, 2), losses_of(apart)
    packing = ["algorithm.args.packing=true", "algorithm.args.max_length=96"]
    trainer = trainer_on(tiny(), tmp_path / "packed", PLAIN, *packing)
    for rows in (1, 5):
        metrics = evaluate(trainer, rows)
        for key in ("eval_loss", "eval_mean_token_accuracy"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-4)
        assert losses_of(trainer) == pytest.approx(by_row, rel=1e-4)


def test_a_batch_is_weighted_by_what_each_metric_averages_over() -> None:
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    ids = torch.zeros(4, 5, dtype=torch.long)
    labels = torch.tensor([[7, -100, 1, 2, 3]] * 4)
    assert BatchSizes.of({"input_ids": ids, "labels": labels}, model).of_metric("loss") == 12
    encoder = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    assert BatchSizes.of({"input_ids": ids, "labels": labels}, encoder).of_metric("loss") == 16
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    pairs = BatchSizes.of({"input_ids": ids, "completion_mask": mask}, model)
    sizes = {"logits/chosen": 7, "logits/rejected": 3, "logps/chosen": 2, "entropy": 10, "loss": 4}
    assert {name: pairs.of_metric(name) for name in sizes} == sizes
    marked = {"input_ids": ids, "completion_mask": mask, "label": [True, False, False, False]}
    sizes = {"logits/chosen": 3, "rewards/chosen": 1, "rewards/rejected": 3, "loss": 4}
    assert {name: BatchSizes.of(marked, model).of_metric(name) for name in sizes} == sizes
    assert BatchSizes.of([{}] * 3, model).of_metric("reward") == 3


def test_only_virtual_tokens_and_encoders_predict_a_first_token() -> None:
    def model(peft_type: str, tokens: int) -> Any:
        adapter = SimpleNamespace(peft_type=peft_type, num_virtual_tokens=tokens)
        config = SimpleNamespace(is_encoder_decoder=False)
        return SimpleNamespace(config=config, peft_config={"default": adapter})

    assert predicts_first(model("PeftType.P_TUNING", 8))
    assert not predicts_first(model("PeftType.PREFIX_TUNING", 8))
    assert not predicts_first(model("PeftType.LORA", 0))


def test_means_by_hand() -> None:
    assert mean([(1.0, 1), (4.0, 2)]) == 3
    assert math.isnan(mean([(1.0, 1), (math.nan, 2)]))  # a loss that is NaN stays visible
    assert combined("reward", [(1.0, 1), (math.nan, 2)]) == 1  # no reward: not counted
    assert math.isnan(combined("reward", [(math.nan, 2)]))
    assert combined("min_reward", [(1.0, 1), (-2.0, 2)]) == -2
    assert combined("completions/max_length", [(1.0, 1), (9.0, 2)]) == 9
    assert mean([(0.1, 3)]) == 0.1


def test_each_batch_is_counted_once_and_processes_in_step_get_equally_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dealt(rank: int) -> tuple[list[int], list[int], int]:
        monkeypatch.setattr(world, "rank", rank)
        batches = Dealt(range(7))
        taken = [(batch, batches.is_another) for batch in batches]
        counted = [batch for batch, is_another in taken if not is_another]
        return [batch for batch, _ in taken], counted, len(batches)

    monkeypatch.setattr(world, "size", 3)
    own = [[0, 3, 6], [1, 4], [2, 5]]
    assert [dealt(rank) for rank in range(3)] == [(b, b, len(b)) for b in own]
    monkeypatch.setattr(world, "in_step", True)
    taken = [[0, 3, 6], [1, 4, 6], [2, 5, 6]]
    assert [dealt(rank) for rank in range(3)] == [
        (t, b, 3) for t, b in zip(taken, own, strict=True)
    ]


def test_a_batch_that_another_process_counts_leaves_no_metric() -> None:
    class Collecting:
        def __init__(self) -> None:
            self.model, self._metrics = None, {"eval": {"loss": [1.0]}}

        def prediction_step(self, *_: Any) -> tuple[float, None, None]:
            for name in ("loss", "num_tokens"):
                self._metrics["eval"].setdefault(name, []).append(2.0)
            return 2.0, None, None

    trainer: Any = type("Trainer", (Averages, Collecting), {})()
    trainer._dealt = SimpleNamespace(is_another=True)
    assert trainer.prediction_step(None, ["a row"]) == (None, None, None)
    assert trainer._metrics == {"eval": {"loss": [1.0]}}
