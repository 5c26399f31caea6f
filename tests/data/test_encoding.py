"""Tokens that count in the loss: exactly the answers, with their end tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from lora_exp.data import tasks
from lora_exp.data.encoding import IGNORED, encode
from lora_exp.data.examples import prompts, raw
from lora_exp.data.rendered import Prompt, prompt_of
from lora_exp.errors import DataError
from lora_exp.model.special_tokens import without_end
from lora_exp.rewards import AdapterReward
from lora_exp.training.answers import ids_of
from lora_exp.training.measure import encoded


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


def with_ends(base: Any) -> Any:
    """Return a tokenizer that adds a BOS and an EOS token to each text."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.bos_token, ends = "<|endoftext|>", ("<|endoftext|>", tokenizer.eos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}",
        special_tokens=[(end, tokenizer.convert_tokens_to_ids(end)) for end in ends],
    )
    return tokenizer


@pytest.mark.parametrize("prompt", ["Q: a", "<|endoftext|>Q: a"])
@pytest.mark.parametrize("answer", [" b", " b<|im_end|>", " b<|im_end|>\n"])
def test_texts_have_one_bos_and_one_eos_token_everywhere(
    base: Any, prompt: str, answer: str
) -> None:
    """In training, measured, answered and rewarded: whatever text and tokenizer add."""
    tokenizer = with_ends(base)
    whole = tokenizer("Q: a b")["input_ids"]
    row = {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": "c", "label": True}
    assert [ids for ids, _ in encode([row], tokenizer, True)] == [whole]  # type: ignore[misc]
    assert encoded(row, "chosen", tokenizer) == (whole, len(whole) - 2)
    assert ids_of(Prompt(prompt, None, chat=False), tokenizer, base.model) == whole[:-2]
    reward = AdapterReward.__new__(AdapterReward)
    reward.tokenizer = tokenizer
    assert reward._encode(prompt, answer, None) == whole
    for shape, answers in (("preference", ["chosen"]), ("unpaired_preference", ["completion"])):
        (trained,) = raw([row], shape, tokenizer).dataset
        for field in answers:  # TRL adds an EOS token to answers without one
            ids = without_end(tokenizer)(trained["prompt"] + trained[field])["input_ids"]
            assert ids == whole
    assert prompts([row], tokenizer, 9, "train").dataset["prompt"] == ["Q: a"]


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
