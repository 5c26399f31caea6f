"""What a person sees."""

from __future__ import annotations

from typing import Any

from lora_exp.data.tokens import IGNORED
from lora_exp.record.progress import SHOWN_TOKENS, preview


def test_the_preview_marks_what_counts(base: Any) -> None:
    ids = base.tokenizer("Hi!\nYes.")["input_ids"]
    labels = [IGNORED] * (len(ids) - 2) + ids[-2:]
    text = preview(ids, labels, base.tokenizer).plain
    assert text.startswith("Hi!↵")
    assert text.count("«") == text.count("»") == 1
    assert text.endswith("»")


def test_a_long_row_is_cut_and_says_so(base: Any) -> None:
    ids = base.tokenizer("x " * 300)["input_ids"]
    assert preview(ids, ids, base.tokenizer).plain.endswith(
        f"» … {len(ids) - SHOWN_TOKENS} more tokens"
    )
