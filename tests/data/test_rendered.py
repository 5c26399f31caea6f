"""A row's text, the spans of its answers, and what it asks."""

from __future__ import annotations

from typing import Any

from lora_exp.data.rendered import Prompt, prompt_of, rendered
from tests.data.test_tokens import chat


def test_spans_are_the_answers_with_what_ends_them(base: Any) -> None:
    text, spans = rendered(chat("one", "two", "three", "four"), base.tokenizer)
    assert [text[a:b] for a, b in spans] == ["two<|im_end|>\n", "four<|im_end|>\n"]
    text, spans = rendered({"prompt": "Q: a", "completion": " b"}, base.tokenizer)
    assert [text[a:b] for a, b in spans] == [" b" + base.tokenizer.eos_token]
    text, spans = rendered({"text": "whole"}, base.tokenizer)
    assert spans == [(0, len(text))]


def test_a_prompt_opens_the_answer_and_text_asks_nothing(base: Any) -> None:
    text = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(chat("Hi!", "Yes."), base.tokenizer) == Prompt(text, "Yes.\n", chat=True)
    row = {"prompt": "p", "completion": "c"}
    assert prompt_of(row, base.tokenizer) == Prompt("p", "c", chat=False)
    assert prompt_of({"text": "t"}, base.tokenizer) is None
