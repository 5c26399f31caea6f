"""Tokenised rows: cut, counted, cached, by one process or several."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_exp.data.encoding import IGNORED
from lora_exp.data.shapes import LocatedRow, location_of
from lora_exp.data.tokens import _key, tokenise
from lora_exp.errors import DataError
from tests.data.test_encoding import TEMPLATES, chat


def test_rows_that_the_template_refuses_are_named_or_left_out(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    bad = {"messages": [{"role": "system", "content": "be"}, *chat("q", "a")["messages"]]}
    rows = [LocatedRow(chat("q", "a"), "rows.jsonl:1"), LocatedRow(bad, "rows.jsonl:2")]
    options: dict[str, Any] = {"max_length": 64, "completion_only": True, "what": "train"}
    refusal = r"rows.jsonl:2: the chat template refuses it: System role not supported"
    for cached in (False, True):
        with pytest.raises(DataError, match=refusal):
            tokenise(rows, tokenizer, **options)
        tokens = tokenise(rows, tokenizer, on_error="skip", **options)
        assert (tokens.counts.rows, [*tokens.refused], tokens.cached) == (1, ["rows.jsonl:2"], True)
        if cached:  # the same rows of another file have its lines
            moved = [LocatedRow(row, f"other.jsonl:{i}") for i, row in enumerate(rows)]
            assert [*tokenise(moved, tokenizer, on_error="skip", **options).refused] == [
                "other.jsonl:1"
            ]


def test_rows_are_truncated_and_rows_without_answer_tokens_dropped(base: Any) -> None:
    rows = [chat("short", "a b c"), chat("x " * 60, "never reached"), chat("ok", "y " * 60)]
    tokens = tokenise(rows, base.tokenizer, max_length=40, completion_only=True, what="train")
    counts = tokens.counts
    assert (counts.rows, counts.truncated, counts.dropped) == (2, 2, 1)
    assert [len(row["input_ids"]) for row in tokens.dataset] == [17, 40]
    assert counts.tokens == 57
    labels = [label for row in tokens.dataset for label in row["labels"]]
    assert counts.trained_tokens == sum(label != IGNORED for label in labels)


def test_rows_without_anything_to_learn_are_an_error(base: Any) -> None:
    with pytest.raises(DataError, match=r"none of the 1 train rows .*\(max_length 8\)"):
        tokenise(
            [chat("x " * 60, "a")], base.tokenizer, max_length=8, completion_only=True, what="train"
        )


def test_chats_without_a_template_are_an_error_with_the_remedy(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data.chat_template="):
        tokenise([chat("a", "b")], tokenizer, max_length=8, completion_only=True, what="train")


def test_the_same_rows_are_read_from_the_cache_and_changed_rows_are_not(base: Any) -> None:
    options: dict[str, Any] = {"max_length": 64, "completion_only": True, "what": "train"}
    rows = [chat("cached?", "yes")]
    first = tokenise(rows, base.tokenizer, **options)
    base.tokenizer(["pad me", "a longer one"], padding=True)  # leaves padding in the tokenizer
    again = tokenise(rows, base.tokenizer, **options)
    assert (first.cached, again.cached) == (False, True)
    assert first.counts == again.counts
    assert first.dataset[:] == again.dataset[:]
    changed = copy.deepcopy(base.tokenizer)
    changed.chat_template = changed.chat_template.replace("<|im_end|>", "<|im_end|> ")
    assert not tokenise(rows, changed, **options).cached
    assert not tokenise([chat("cached?", "no")], base.tokenizer, **options).cached
    renamed = copy.deepcopy(base.tokenizer)
    renamed.bos_token = "<|endoftext|>"  # templates write it
    assert not tokenise(rows, renamed, **options).cached
    tools = [{"name": "f", "parameters": {}}, {"parameters": {}, "name": "f"}]
    with_tools = [chat("cached?", "yes") | {"tools": [tool]} for tool in tools]
    assert _key(with_tools[:1], base.tokenizer) != _key(with_tools[1:], base.tokenizer)
    assert not tokenise(rows, base.tokenizer, **{**options, "max_length": 63}).cached


def test_the_key_leaves_out_padding_and_truncation_and_keeps_them(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    key = _key([], tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=1, direction="left")
    tokenizer.backend_tokenizer.enable_truncation(5, stride=1, direction="left")
    before = tokenizer.backend_tokenizer.to_str()
    assert _key([], tokenizer) == key
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer.add_tokens(["<new>"])
    assert _key([], tokenizer) != key


def test_several_processes_make_the_files_of_one(base: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("lora_exp.data.tokens.CHUNK", 3)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    refused = {"messages": [{"role": "system", "content": "x"}, *chat("q", "a")["messages"]]}
    rows = [chat(f"question {i}", f"answer {i} " * (i % 4)) for i in range(10)] + [refused]
    options = {"max_length": 75, "completion_only": True, "on_error": "skip", "what": "train"}
    one = tokenise(rows, tokenizer, **options)
    file = Path(one.dataset.cache_files[0]["filename"])
    content = file.read_bytes()
    shutil.rmtree(file.parent)
    two = tokenise(rows, tokenizer, num_proc=2, **options)
    assert not two.cached
    assert file.read_bytes() == content
    assert (two.counts, two.lengths, two.refused) == (one.counts, one.lengths, one.refused)
    assert list(one.refused) == [location_of(refused)]
    assert one.counts.truncated > 0
    assert one.counts.rows == len(one.dataset) > 3
    assert one.counts.trained_tokens == sum(
        label != IGNORED for row in one.dataset["labels"] for label in row
    )
