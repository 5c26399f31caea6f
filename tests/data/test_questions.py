"""Questions and answers in the columns of well-known data sets."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.data.formats import FORMATS, detect
from lora_exp.data.questions import QUESTIONS, asked_in, history_in, names_in, question_in
from lora_exp.data.turns import FieldError


@pytest.mark.parametrize("names", QUESTIONS, ids=lambda names: "-".join(names.columns))
def test_every_context_of_a_question_is_asked(names: Any) -> None:
    contexts = {name: f"the {name}" for name in names.contexts}
    row = {names.question: "what?", **contexts, names.answer: "that"}
    assert detect(row, "here") == "alpaca"
    asked = "\n\n".join(["what?", *contexts.values()])
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "that"}]
    assert FORMATS["alpaca"](row | {"task": "t"}) == {"messages": turns, "task": "t"}
    for column in contexts:  # a column that is missing or empty is none
        content = question_in(row | {column: None}, names)["content"]
        assert content.count("the ") == len(contexts) - 1


def test_a_question_without_an_answer_is_a_prompt() -> None:
    assert asked_in({"instruction": "do", "input": "this"}) == [
        {"role": "user", "content": "do\n\nthis"}
    ]
    assert asked_in({"answer": "that"}) is None
    assert names_in({"answer": "that"}).question == "instruction"


def test_a_context_or_a_history_of_another_type_is_named() -> None:
    with pytest.raises(FieldError, match="field 'context' is"):
        asked_in({"question": "q", "context": {"title": "t"}})
    with pytest.raises(FieldError, match="'history' is not a list of pairs"):
        history_in({"history": [["q"]]})
