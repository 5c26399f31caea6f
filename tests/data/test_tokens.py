"""Tokens that count in the loss: exactly the answers, with their end tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lora_exp.data import tasks
from lora_exp.data.rendered import prompt_of
from lora_exp.data.shapes import LocatedRow
from lora_exp.data.tokens import IGNORED, encode, tokenise
from lora_exp.errors import DataError


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": s} for i, s in enumerate(contents)]}


def trained_text(row: dict[str, Any], tokenizer: Any, completion_only: bool = True) -> str:
    (encoded,) = encode([row], tokenizer, completion_only)
    if isinstance(encoded, DataError):
        raise encoded
    ids, labels = encoded
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([token for token in labels if token != IGNORED])


def test_only_the_answer_counts_with_its_end(base: Any) -> None:
    assert trained_text(chat("Hi!", "Yes."), base.tokenizer) == "Yes.<|im_end|>\n"


def test_every_assistant_turn_counts_and_no_user_turn(base: Any) -> None:
    row = chat("one", "two", "three", "four")
    assert trained_text(row, base.tokenizer) == "two<|im_end|>\nfour<|im_end|>\n"


def test_a_completion_counts_and_gets_its_end(base: Any) -> None:
    row = {"prompt": "Q: a", "completion": " b"}
    assert trained_text(row, base.tokenizer) == " b<|im_end|>"


def test_all_of_a_text_counts_and_it_gets_one_end_token(base: Any) -> None:
    assert trained_text({"text": "abc"}, base.tokenizer) == "abc<|im_end|>"
    assert trained_text({"text": "abc<|im_end|>"}, base.tokenizer) == "abc<|im_end|>"


def test_everything_counts_unless_completion_only(base: Any) -> None:
    text = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert trained_text(chat("Hi!", "Yes."), base.tokenizer, completion_only=False) == text


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize(
    ("template", "specials", "counted_text", "expected"),
    [
        ("qwen3", ["<|im_end|>", "<|im_start|>"],
         "one<|im_end|>\ntwo<|im_end|>\n<think>\n\n</think>\n\nthree<|im_end|>\n",
         "<think>\n\n</think>\n\nthree\n"),
        ("phi3", ["<|end|>", "<|endoftext|>"],
         "one<|end|>\n<think>t</think>\n\ntwo<|end|>\nthree<|end|>\n<|end|>", "three\n"),
        ("llama3_2", ["<|eot_id|>", "<|end_of_text|>"],
         "one<|eot_id|><think>t</think>\n\ntwo<|eot_id|>three<|eot_id|>", "three"),
        ("gemma", ["<end_of_turn>", "<eos>"],
         "one<end_of_turn>\n<think>t</think>\n\ntwo<end_of_turn>\nthree<end_of_turn>\n", "three\n"),
    ],
)  # fmt: skip
def test_every_turn_counts_under_the_templates_of_real_models(
    base: Any, template: str, specials: list[str], counted_text: str, expected: str
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer.add_special_tokens({"eos_token": specials[0], "additional_special_tokens": specials})
    tokenizer.bos_token = "<|endoftext|>"
    row = chat("q1", "one", "q2", "<think>t</think>\n\ntwo", "q3", "three")
    assert trained_text(row, tokenizer) == counted_text
    prompt = prompt_of(row, tokenizer)
    assert prompt is not None
    assert prompt.answer == expected


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


def test_a_turn_that_the_template_does_not_show_is_an_error(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    # like templates that summarise earlier turns
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last or m.role == 'user' else 'summary' }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = chat("q", "one", "r", "two")
    with pytest.raises(DataError, match=r"does not show assistant turn 1: 'one'"):
        trained_text(row, tokenizer)


def test_our_labels_equal_those_of_trl_on_prompt_and_answer(base: Any, tmp_path: Any) -> None:
    rows = tasks.take(tasks.CORPUS, 5, 40, held_out=False)
    rows += [chat("wide   spaces", "é ü\n\nnew"), chat("", "only an answer")]
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, max_length=512,
        gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=copy.deepcopy(base.model), args=args, train_dataset=Dataset.from_list(pairs),
        processing_class=copy.deepcopy(base.tokenizer),
    )  # fmt: skip
    expected = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert list(encode(rows, base.tokenizer, True)) == expected


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
    assert not tokenise(rows, base.tokenizer, **{**options, "max_length": 63}).cached
