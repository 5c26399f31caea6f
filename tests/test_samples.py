"""Greedy answers are those of the model alone, whatever the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lora_exp import corpus
from lora_exp.samples import Sample, answer, exact_match


def settings(**values: int) -> Any:
    return SimpleNamespace(**({"rows": 8, "max_new_tokens": 16, "batch_size": 8} | values))


def test_the_embedded_model_copies_letters_it_never_saw(base: Any) -> None:
    rows = corpus.take({"copy": corpus.copy}, 1, 8, held_out=True)
    answers = answer(base.model, base.tokenizer, rows, settings(), "before")
    assert exact_match(answers)["exact_match"] >= 0.75


def test_answers_do_not_depend_on_the_batch(base: Any) -> None:
    rows = corpus.take(corpus.CORPUS, 2, 6, held_out=True)
    one = answer(base.model, base.tokenizer, rows, settings(batch_size=1), "before")
    six = answer(base.model, base.tokenizer, rows, settings(batch_size=6), "before")
    assert [s.before for s in one] == [s.before for s in six]


def test_everything_is_left_as_it_was(base: Any) -> None:
    base.model.train()
    state = base.tokenizer.backend_tokenizer.to_str()
    answer(base.model, base.tokenizer, corpus.take(corpus.CORPUS, 2, 2, True), settings(), "x")
    assert base.model.training
    assert base.tokenizer.backend_tokenizer.to_str() == state
    base.model.eval()


def test_no_rows_ask_nothing(base: Any) -> None:
    assert answer(base.model, base.tokenizer, [{"text": "t"}], settings(), "before") == []
    assert exact_match([]) == {}


def test_exact_match_counts_by_task_too() -> None:
    answers = [
        Sample("p", "a", "x", " a\n"),
        Sample("p", "a", "y", "b"),
        Sample("p", "a", None, "a"),
    ]
    found = exact_match(answers)
    assert found == {"exact_match": 2 / 3, "exact_match_x": 1.0, "exact_match_y": 0.0}
