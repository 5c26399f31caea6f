"""Pairs, labelled answers and prompts: their conversion, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.data.formats import FORMATS, common_prefix, detect
from lora_exp.data.turns import FieldError

ASK = [{"role": "user", "content": "q"}]
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
    ],
)  # fmt: skip
def test_pairs_are_read_with_and_without_a_prompt_field(
    row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any
) -> None:
    assert detect(row, "here") == "preference"
    row_read = FORMATS["preference"](row | {"task": "t"})
    assert row_read == {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": "t"}


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' is 3, not text"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": BAD}, "one of 'chosen' and"),
        ("preference", {"chosen": "yes", "rejected": "no"}, "begin with nothing shared"),
        ("preference", {"chosen": ASK + GOOD, "rejected": ASK}, "begin with nothing shared"),
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": 1}, "'label' is 1"),
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
