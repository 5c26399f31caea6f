"""Greedy answers are those of the model alone, whatever the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.data import tasks
from lora_exp.training.answers import Answer, answer, batches, exact_match


def settings(**values: int) -> Any:
    return SimpleNamespace(**({"rows": 8, "max_new_tokens": 16, "batch_size": 8} | values))


def test_the_embedded_model_copies_letters_it_never_saw(base: Any) -> None:
    rows = tasks.take({"copy": tasks.copy}, 1, 8, held_out=True)
    answers = answer(base.model, base.tokenizer, rows, settings(), "before")
    assert exact_match(answers)["exact_match"] >= 0.75


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", ["none", "prompt_tuning", "prefix_tuning"])
def test_answers_do_not_depend_on_the_batch(fresh_base: Any, tmp_path: Any, method: str) -> None:
    model = attach(fresh_base, compose(f"peft={method}"), tmp_path).model
    rows = tasks.take(tasks.CORPUS, 2, 6, held_out=True)
    one = answer(model, fresh_base.tokenizer, rows, settings(batch_size=1), "before")
    six = answer(model, fresh_base.tokenizer, rows, settings(batch_size=6), "before")
    assert [a.said for a in one] == [a.said for a in six]


def test_everything_is_left_as_it_was(base: Any) -> None:
    base.model.train()
    assert base.tokenizer.padding_side == "right"
    state = (base.tokenizer.backend_tokenizer.to_str(), base.tokenizer.padding_side)
    answer(base.model, base.tokenizer, tasks.take(tasks.CORPUS, 2, 2, True), settings(), "x")
    assert base.model.training
    assert (base.tokenizer.backend_tokenizer.to_str(), base.tokenizer.padding_side) == state
    base.model.eval()


def test_behind_virtual_tokens_only_prompts_of_one_length_share_a_batch() -> None:
    prompts = [[1] * length for length in (3, 2, 3, 2, 2)]
    plain = SimpleNamespace()
    assert batches(prompts, plain, 3) == [[1, 3, 4], [0, 2]]
    assert batches(prompts, plain, 4) == [[1, 3, 4, 0], [2]]
    prompted = SimpleNamespace(peft_config={"default": SimpleNamespace(num_virtual_tokens=4)})
    assert batches(prompts, prompted, 4) == [[1, 3, 4], [0, 2]]


def test_no_rows_ask_nothing(base: Any) -> None:
    assert answer(base.model, base.tokenizer, [{"text": "t"}], settings(), "before") == []
    assert exact_match([]) == {}


def test_exact_match_counts_by_task_too() -> None:
    answers = [
        Answer("p", "a", " a\n", "x"),
        Answer("p", "a", "b", "y"),
        Answer("p", "a", "a", None),
    ]
    found = exact_match(answers)
    assert found == {"exact_match": 2 / 3, "exact_match_x": 1.0, "exact_match_y": 0.0}
