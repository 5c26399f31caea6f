"""Pairs, labelled answers and prompts: their conversion, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.data.formats import FORMATS, EmptyAnswer, common_prefix, detect, read_as
from lora_exp.data.turns import FieldError

ASK = [{"role": "user", "content": "q"}]
SYSTEM = [{"role": "system", "content": "be brief"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "q ", "chosen": "good", "rejected": "bad"}, "q ", "good", "bad"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, ASK, GOOD, BAD),
        ({"prompt": ASK, "chosen": "good", "rejected": "bad"}, ASK, GOOD, BAD),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, ASK, GOOD, BAD),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK, GOOD, BAD),
        ({"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK, GOOD, BAD),
        ({"chosen": "the sky is blue", "rejected": "the sky is black"},
         "the sky is ", "blue", "black"),
        ({"chosen": "q: yes", "rejected": "q: yesterday"}, "q: ", "yes", "yesterday"),
        ({"question": "q", "chosen": "I say good", "rejected": "I say bad"}, ASK,
         *([{"role": "assistant", "content": f"I say {text}"}] for text in ("good", "bad"))),
        ({"query": "q", "chosen": GOOD, "rejected": BAD}, ASK, GOOD, BAD),
        ({"prompt": SYSTEM + ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD},
         SYSTEM + ASK, GOOD, BAD),
        ({"prompt": ASK, "chosen": SYSTEM + ASK + GOOD, "rejected": SYSTEM + ASK + BAD},
         SYSTEM + ASK, GOOD, BAD),
    ],
)  # fmt: skip
def test_pairs_are_read_with_and_without_a_prompt_field(
    row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any
) -> None:
    assert detect(row, "here") == "preference"
    row_read = FORMATS["preference"](row | {"task": "t"})
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": "t"}
    assert row_read == {key: row[key] for key in row if key in ("question", "query")} | pair


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' is 3, not text"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": BAD}, "one of 'chosen' and"),
        ("preference", {"chosen": "yes", "rejected": "no"}, "begin with nothing shared"),
        ("preference", {"chosen": ASK + GOOD, "rejected": ASK}, "last turn of 'rejected' is not"),
        (
            "preference",
            {"prompt": SYSTEM, "chosen": ASK + GOOD, "rejected": ASK + BAD},
            "'prompt' is another chat",
        ),
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": 2}, "'label' is 2"),
        ("unpaired_preference", {"prompt": "q", "completion": GOOD, "label": True}, "one of"),
        ("prompt", {"prompt": []}, "'prompt' is .*, not text|not a list of turns"),
        ("prompt", {"prompt": ""}, "'prompt' is empty"),
    ],
)
def test_fields_that_cannot_be_used_are_named(
    format: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        FORMATS[format](row)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_one_in_every_format(empty: str) -> None:
    no_answer = [{"role": "assistant", "content": empty}]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": empty}],
        "alpaca": [{"instruction": "q", "response": empty}],
        "messages": [{"messages": ASK + no_answer}],
        "prompt_completion": [
            {"prompt": "q", "completion": empty},
            {"prompt": ASK + GOOD + ASK, "completion": no_answer},
        ],
        "preference": [
            {"prompt": "q", "chosen": empty, "rejected": "bad"},
            {"prompt": ASK, "chosen": GOOD, "rejected": no_answer},
        ],
        "unpaired_preference": [
            {"prompt": "q", "completion": empty, "label": True},
            {"prompt": ASK, "completion": no_answer, "label": False},
        ],
    }
    for format, several in rows.items():
        for row in several:
            with pytest.raises(EmptyAnswer):
                FORMATS[format](row)


def test_the_answers_within_a_prompt_do_not_count() -> None:
    row = {"prompt": ASK + GOOD + ASK, "completion": BAD}
    turns = FORMATS["prompt_completion"](row)["messages"]
    assert [turn.get("weight", 1) for turn in turns if turn["role"] == "assistant"] == [0, 1]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_is_never_left_out(column: str) -> None:
    for row in (
        {"prompt": "q", "completion": "good"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "q"},
    ):
        with pytest.raises(FieldError, match=f"'{column}' is a system prompt.*data.as_chat=true"):
            read_as(detect(row, "here"), row | {column: "be brief"})
        read = read_as(detect(row, "here"), row | {column: "be brief"}, as_chat=True)
        assert read.get("messages", read.get("prompt"))[:2] == SYSTEM + ASK
    for row in ({"question": "q", "response": "good"}, {"messages": ASK + GOOD}):
        read = read_as(detect(row, "here"), row | {column: "be brief"})
        assert read == {"messages": SYSTEM + ASK + GOOD}


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [([True, 1, 1.0, "1", "True"], True), ([False, 0, 0.0, "0", "FALSE"], False)],
)
def test_labels_of_tables_are_true_or_false(labels: list[Any], wanted: bool) -> None:
    for label in labels:
        row = {"prompt": "q", "completion": "a", "label": label}
        assert read_as("unpaired_preference", row)["label"] is wanted


def test_a_text_label_is_not_an_unpaired_preference() -> None:
    row = {"prompt": "q", "completion": "a", "label": "easy"}
    assert detect(row, "here") == "prompt_completion"
    assert detect(row | {"label": False}, "here") == "unpaired_preference"


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [("abc", "abd", 2), ("ab", "abc", 2), ("", "x", 0), ([1, 2, 3], [1, 2, 4], 2), ("a", "a", 1)],
)
def test_the_length_of_a_common_prefix(a: Any, b: Any, shared: int) -> None:
    assert common_prefix(a, b) == shared
