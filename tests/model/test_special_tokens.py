"""End tokens of answers, and the pad token of batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from lora_exp.model.loading import Base
from lora_exp.model.special_tokens import end_tokens, ensure_pad_token, set_end_tokens, without_end


@pytest.mark.parametrize("model_end", [None, 7, [7, 9], [2, 7]])
def test_end_tokens_of_tokenizer_and_model_end_an_answer(fresh_base: Base, model_end: Any) -> None:
    fresh_base.model.generation_config.eos_token_id = model_end
    model_ends = model_end if isinstance(model_end, list) else [model_end]
    expected = {fresh_base.tokenizer.eos_token_id, *model_ends} - {None}
    assert end_tokens(fresh_base.model, fresh_base.tokenizer) == sorted(expected)


def test_the_end_token_pads_only_if_there_is_no_pad_token(base: Base) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    pad_token = tokenizer.pad_token
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == pad_token != tokenizer.eos_token
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


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
