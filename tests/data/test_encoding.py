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
from lora_exp.data.encoding import IGNORED, encode
from lora_exp.data.rendered import prompt_of
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
