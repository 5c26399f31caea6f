"""Held-out rows are evaluated in the order of their lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_exp.training.longest_first import LongestFirst, tokens_of
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


def test_rows_without_tokens_and_labelled_answers_keep_their_order() -> None:
    assert tokens_of(Dataset.from_dict({"prompt": ["a", "b"]})) is None
    marked = {"prompt_ids": [[1]], "completion_ids": [[1]], "label": [True]}
    assert tokens_of(Dataset.from_dict(marked)) is None
    assert tokens_of([{"input_ids": [1]}]) is None


@pytest.mark.parametrize("case", ["sft", "pretrain", "dpo", "reward"])
def test_rows_of_a_batch_have_about_the_same_length(
    fresh_base: Any, tmp_path: Path, case: str
) -> None:
    rows, overrides = CASES[case]
    base = tiny(task_type="SEQ_CLS") if case == "reward" else fresh_base
    trainer = trainer_on(base, tmp_path, [*rows[::2], *rows[1::2]], *overrides)
    trainer.args.per_device_eval_batch_size = 2
    masks = [batch["attention_mask"] for batch in trainer.get_eval_dataloader()]
    pairs = case in ("dpo", "reward")  # of one length in all, so as they come
    assert [len(mask) for mask in masks] == [4 if pairs else 2] * 5 + [2 if pairs else 1]
    if not pairs:
        widths = [mask.shape[1] for mask in masks]
        assert widths == sorted(widths, reverse=True)
        assert sum(int((mask == 0).sum()) for mask in masks) <= 3 * len(masks)


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
