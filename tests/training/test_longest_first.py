"""Held-out rows are evaluated in the order of their lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_exp.training.longest_first import LongestFirst, may_be_ordered, tokens_of
from tests.conftest import tiny
from tests.training.test_averages import CASES, trainer_on


def test_the_longest_rows_come_first_and_equal_ones_as_they_are() -> None:
    sampler = LongestFirst([3, 7, 3, 9, 7])
    assert list(sampler) == [3, 1, 4, 0, 2]
    assert len(sampler) == 5


def test_tokens_of_all_columns_are_counted_also_where_rows_are_selected() -> None:
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1], [1, 2], [1, 2, 3]],
            "chosen_ids": [[1, 2], [], [1]],
            "text": ["a", "b", "c"],
        }
    )
    assert tokens_of(rows) == [3, 2, 4]
    assert tokens_of(rows.select([2, 0])) == [4, 3]


def test_only_columns_of_tokens_are_counted() -> None:
    assert tokens_of(Dataset.from_dict({"prompt": ["a", "b"]})) is None
    assert tokens_of(Dataset.from_dict({"input_ids": [[1, 2], []], "doc_ids": [7, 8]})) == [2, 0]
    assert tokens_of(Dataset.from_dict({"doc_ids": [7, 8]})) is None
    assert tokens_of([{"input_ids": [1]}]) is None


@pytest.mark.parametrize("case", ["sft", "pretrain", "dpo", "reward"])
def test_rows_of_a_batch_have_about_the_same_length(
    fresh_base: Any, tmp_path: Path, case: str
) -> None:
    rows, overrides = CASES[case]
    rows = [row | ({"rejected": "no"} if "rejected" in row else {}) for row in rows]
    base = tiny(task_type="SEQ_CLS") if case == "reward" else fresh_base
    trainer = trainer_on(base, tmp_path, [*rows[::2], *rows[1::2]], *overrides)
    trainer.args.per_device_eval_batch_size = 2
    masks = [batch["attention_mask"] for batch in trainer.get_eval_dataloader()]
    per_row = 2 if case in ("dpo", "reward") else 1
    assert [len(mask) for mask in masks] == [2 * per_row] * 5 + [per_row]
    widths = [mask.shape[1] for mask in masks]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


def test_labelled_answers_and_padding_free_batches_are_evaluated_as_they_come(
    fresh_base: Any, tmp_path: Path
) -> None:
    rows, overrides = CASES["kto"]
    trainer = trainer_on(fresh_base, tmp_path, rows, *overrides)
    sampler = trainer._get_eval_sampler(trainer.eval_dataset)
    assert list(sampler) == list(range(len(rows)))
    rows, overrides = CASES["sft"]
    flattened = ["+algorithm.args.padding_free=true", "algorithm.args.max_length=null"]
    flat = trainer_on(tiny(), tmp_path / "flat", rows, *overrides, *flattened)
    assert list(flat._get_eval_sampler(flat.eval_dataset)) == list(range(len(rows)))


def test_rows_keep_their_order_where_a_result_depends_on_the_batch(
    fresh_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, overrides = CASES["dpo"]
    trainer = trainer_on(fresh_base, tmp_path, rows, *overrides)
    assert may_be_ordered(trainer)
    for losses in (["aot"], ["sigmoid", "aot_unpaired"]):
        monkeypatch.setattr(trainer, "loss_types", losses)
        assert not may_be_ordered(trainer)
    monkeypatch.setattr(trainer, "loss_types", ["sigmoid"])
    config = trainer.model.config.get_text_config()
    monkeypatch.setattr(config, "output_router_logits", False, raising=False)
    assert not may_be_ordered(trainer)  # trl asks for them in the call
    monkeypatch.delattr(config, "output_router_logits")
    assert may_be_ordered(trainer)
    monkeypatch.setattr(type(trainer), "__module__", "somebody.elses")
    assert not may_be_ordered(trainer)
