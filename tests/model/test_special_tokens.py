"""End tokens of answers, and the pad token of batches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from lora_exp.errors import ConfigError
from lora_exp.model.loading import Base
from lora_exp.model.special_tokens import end_tokens, ensure_pad_token, set_end_tokens, without_end
from tests.conftest import tiny


@pytest.mark.parametrize("model_end", [None, 7, [7, 9], [2, 7]])
def test_end_tokens_of_tokenizer_and_model_end_an_answer(fresh_base: Base, model_end: Any) -> None:
    fresh_base.model.generation_config.eos_token_id = model_end
    model_ends = model_end if isinstance(model_end, list) else [model_end]
    expected = {fresh_base.tokenizer.eos_token_id, *model_ends} - {None}
    assert end_tokens(fresh_base.model, fresh_base.tokenizer) == sorted(expected)


@pytest.mark.parametrize(
    ("special", "unknown", "expected"),
    [
        (["<|fim_pad|>", "<|reserved_0|>"], None, "<|fim_pad|>"),
        (["<|image_pad|>", "<unused3>", "<unused4>"], None, "<unused3>"),
        (["<|reserved_special_token_7|>"], "<unk>", "<|reserved_special_token_7|>"),
        (["<|image_pad|>"], "<unk>", "<unk>"),
        ([], "</s>", "</s>"),  # as GPT-2, whose only special token is all of them
        ([], None, "</s>"),
    ],
)
def test_a_tokenizer_without_a_pad_token_pads_with_a_token_that_no_text_has(
    special: list[str], unknown: str | None, expected: str
) -> None:
    tokenizer = plain_tokenizer(special, eos_token="</s>", unk_token=unknown)
    assert tokenizer.pad_token is None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == expected
    ensure_pad_token(tokenizer)  # and keeps it
    assert tokenizer.pad_token == expected
    padded = tokenizer.pad({"input_ids": [[1], [1, 1]]})["input_ids"][0]
    assert padded == [1, tokenizer.convert_tokens_to_ids(expected)]
    assert tokenizer.decode(padded, skip_special_tokens=True) == "b"


def plain_tokenizer(special: list[str], **tokens: str | None) -> Any:
    """Return a tokenizer of the words a and b, and special tokens."""
    words = {"a": 0, "b": 1}
    tokens = {name: token for name, token in tokens.items() if token}
    backend = Tokenizer(WordLevel(words, unk_token="a"))
    backend.add_special_tokens([*special, *tokens.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def test_a_tokenizer_with_neither_pad_nor_eos_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .* neither a pad nor an EOS token; name"):
        ensure_pad_token(plain_tokenizer([]))


def test_an_eos_token_that_also_pads_is_learned_and_scored(tmp_path: Path) -> None:
    """Where nothing else can pad, no EOS token that counts is masked."""
    from lora_exp import compose, run

    folder, base = tmp_path / "base", tiny()
    backend = json.loads(base.tokenizer.backend_tokenizer.to_str())
    eos = base.tokenizer.eos_token
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] == eos]
    one = Tokenizer.from_str(json.dumps(backend))
    PreTrainedTokenizerFast(tokenizer_object=one, eos_token=eos).save_pretrained(folder)
    base.model.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b"}) + "\n"
                            for n in range(1, 9)))  # fmt: skip
    seen: list[Any] = []

    def look(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        seen.append(inputs)
        return own(self, model, inputs, *rest, **more)

    own, SFTTrainer.compute_loss = SFTTrainer.compute_loss, look
    try:
        values = ["model=local", f"model.path={folder}", "data=jsonl", f"data.path={rows}"]
        values += ["tracking=none", "train.max_steps=1", "samples.rows=0", "data.eval_share=0"]
        run(compose(*values, "train.per_device_train_batch_size=8"), tmp_path / "run")
    finally:
        SFTTrainer.compute_loss = own
    labels, mask = seen[-1]["labels"], seen[-1]["attention_mask"]
    eos_id = base.tokenizer.eos_token_id
    assert (seen[-1]["input_ids"] == eos_id).sum() > 8  # it pads, too
    assert ((labels == eos_id).sum(1) == 1).all()
    assert (labels[mask == 0] == -100).all()


@pytest.mark.parametrize("outer", [False, True])
def test_trainers_get_a_tokenizer_that_adds_no_end_token(base: Base, outer: bool) -> None:
    assert without_end(base.tokenizer) is base.tokenizer
    tokenizer = copy.deepcopy(base.tokenizer)
    plain, end = tokenizer("a b")["input_ids"], tokenizer.eos_token_id
    bos, eos = "<|endoftext|>", tokenizer.eos_token
    ids = [(bos, tokenizer.convert_tokens_to_ids(bos)), (eos, end)]
    both = TemplateProcessing(f"{bos} $A {eos}", f"{bos} $A {eos} $B {eos}", ids)
    processor = Sequence([ByteLevel(trim_offsets=False), both]) if outer else both
    tokenizer.backend_tokenizer.post_processor = processor
    first = ids[0][1]
    assert tokenizer("a b")["input_ids"] == [first, *plain, end]
    assert without_end(tokenizer)("a b")["input_ids"] == [first, *plain]
    assert tokenizer("a b")["input_ids"] == [first, *plain, end]  # the original is unchanged


def test_the_end_of_a_templates_turns_becomes_an_end_token(fresh_base: Base) -> None:
    """A base may be trained on chats whose turns end with another token than its texts."""
    tokenizer, model = copy.deepcopy(fresh_base.tokenizer), fresh_base.model
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    set_end_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == sorted({turn, tokenizer.eos_token_id})
