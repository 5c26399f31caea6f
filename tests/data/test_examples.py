"""Pairs and prompts for trainers: counts, refused rows, and the labels of the first row."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset

from lora_exp.config.composition import compose
from lora_exp.data.encoding import IGNORED
from lora_exp.data.examples import (
    first,
    prepared,
    prompt_ids,
    prompts,
    raw,
    recount,
    table,
    unending,
)
from lora_exp.data.rows import corpus
from lora_exp.data.shapes import LocatedRow
from lora_exp.data.tokens import Counts, Tokens
from lora_exp.errors import DataError

ASK = [{"role": "user", "content": "Flip: a b"}]


def test_a_prompt_ends_where_the_answer_begins(base: Any) -> None:
    ids = prompt_ids({"prompt": ASK}, base.tokenizer)
    assert base.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert prompt_ids({"prompt": "a b"}, base.tokenizer) == base.tokenizer("a b")["input_ids"]


def test_prompts_without_room_for_an_answer_are_dropped_and_counted(base: Any) -> None:
    rows = [{"prompt": "a b", "answer": "x"}, {"prompt": "a " * 50, "answer": "y"}]
    tokens = prompts(rows, base.tokenizer, 20, "train")
    assert (tokens.counts.rows, tokens.counts.dropped) == (1, 1)
    assert tokens.dataset["answer"] == ["x"]
    with pytest.raises(DataError, match="none of the 2 eval prompts has at most 1 tokens"):
        prompts(rows, base.tokenizer, 1, "eval")


def test_only_columns_that_the_trainer_reads_are_kept(base: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": "easy", "margin": 1.0}
    assert set(raw([row], "preference", base.tokenizer).dataset.column_names) == {
        "prompt", "chosen", "rejected", "margin",
    }  # fmt: skip


def test_a_table_adds_no_keys_of_other_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "tools": [{"name": "f"}], "id": 1, "meta": {"x": 1}, "answer": 3},
        {"prompt": "b", "tools": [{"kind": "g"}], "id": 2**64 - 1, "meta": {"y": [2]}},
        {"prompt": "c", "answer": "x", "id": 0},
    ]
    names = ("prompt", "tools", "id", "meta", "answer")
    assert table(rows).to_list() == [{name: row.get(name) for name in names} for row in rows]


def test_prompts_that_the_template_refuses_are_named_or_left_out(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    refuse = "{{ raise_exception('no system turn') }}"
    guard = "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}"
    tokenizer.chat_template = guard + tokenizer.chat_template
    bad = [{"role": "system", "content": "be"}, *ASK]
    rows = [
        LocatedRow({"prompt": turns}, f"rows.jsonl:{i}") for i, turns in enumerate((ASK, bad), 1)
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template refuses it: no system"):
        prompts(rows, tokenizer, 99, "train")
    tokens = prompts(rows, tokenizer, 99, "train", on_error="skip")
    assert (tokens.counts.rows, list(tokens.refused)) == (1, ["rows.jsonl:2"])
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("a", "b"))
    pairs = [LocatedRow({**row, "chosen": chosen, "rejected": rejected}, row.where) for row in rows]
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template refuses it: no system"):
        raw(pairs, "preference", tokenizer)
    assert raw(pairs, "preference", tokenizer, on_error="skip").counts.rows == 1


def test_a_template_without_an_end_token_gives_a_warning(base: Any) -> None:
    rows = corpus(0, 4, 2, None).shaped("completion")
    assert unending(rows, base.tokenizer) is None
    endless = copy.deepcopy(base.tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert "does not learn to stop" in str(unending(rows, endless))


def test_as_many_processes_tokenise_as_the_rows_say(base: Any, monkeypatch: Any) -> None:
    counts = []

    def in_processes(function: Any, parts: Any, count: int) -> Any:
        counts.append(count)
        return map(function, parts)

    monkeypatch.setattr("lora_exp.data.tokens.in_processes", in_processes)
    rows = replace(corpus(4711, 8, 4, None), num_proc=3)
    train, held_out = prepared(rows, base.tokenizer, base.model, compose())
    assert counts == [3, 3]
    assert (train.counts.rows, held_out.counts.rows) == (8, 4)


def tokens_of(rows: int) -> Tokens:
    return Tokens(None, Counts(rows, 0, 0, 0, 0), cached=False)


def test_counts_are_those_after_truncation() -> None:
    pair = {"prompt_ids": [1] * 4, "chosen_ids": [2] * 3, "rejected_ids": [3] * 9}
    tokens = recount(tokens_of(3), Dataset.from_list([pair]), 10, "train")
    assert tokens.counts == Counts(
        rows=1, tokens=7 + 10, trained_tokens=3 + 6, truncated=1, dropped=2
    )
    scored = {"chosen_ids": [2] * 3, "rejected_ids": [3] * 9}
    assert (
        recount(tokens_of(1), Dataset.from_list([scored]), 10, "train").counts.trained_tokens == 2
    )


def test_an_empty_result_is_an_error() -> None:
    empty = Dataset.from_dict({"chosen_ids": [], "rejected_ids": []})
    with pytest.raises(DataError, match="each of the 5 eval rows is longer than 8 tokens"):
        recount(tokens_of(5), empty, 8, "eval")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
         [("chosen", [1, 2, 3], [IGNORED, 2, 3]), ("rejected", [1, 4], [IGNORED, 4])]),
        ({"prompt_ids": [1], "completion_ids": [2], "label": True},
         [("wanted", [1, 2], [IGNORED, 2])]),
        ({"prompt_ids": [1], "completion_ids": [2], "label": False},
         [("unwanted", [1, 2], [IGNORED, 2])]),
        ({"chosen_ids": [1, 2], "rejected_ids": [3, 4]},
         [("chosen", [1, 2], [IGNORED, 2]), ("rejected", [3, 4], [IGNORED, 4])]),
        ({"input_ids": [1, 2], "labels": [IGNORED, 2]}, [("", [1, 2], [IGNORED, 2])]),
        ({"input_ids": [1, 2], "labels": [3]},
         [("prompt", [1, 2], [IGNORED, IGNORED]), ("answer", [3], [3])]),
    ],
)  # fmt: skip
def test_the_first_row_has_the_labels_that_count_in_the_loss(
    row: dict[str, Any], expected: Any
) -> None:
    assert first(Tokens([row], Counts(1, 0, 0, 0, 0), cached=False), None) == expected


def test_no_token_of_a_prompt_counts_in_the_loss(base: Any) -> None:
    ((name, ids, labels),) = first(
        Tokens([{"prompt": ASK}], Counts(1, 0, 0, 0, 0), cached=False), base.tokenizer
    )
    assert name.startswith("prompt")
    assert set(labels) == {IGNORED}
    assert len(ids) == len(labels)
