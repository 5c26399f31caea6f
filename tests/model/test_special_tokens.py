"""What ends an answer and pads a batch is decided in one place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from lora_exp.model.loading import Base
from lora_exp.model.special_tokens import end_tokens, ensure_pad_token, set_end_tokens, without_end


@pytest.mark.parametrize("named", [None, 7, [7, 9], [2, 7]])
def test_the_tokenizers_end_and_the_models_end_an_answer(fresh_base: Base, named: Any) -> None:
    fresh_base.model.generation_config.eos_token_id = named
    more = named if isinstance(named, list) else [named]
    expected = {fresh_base.tokenizer.eos_token_id, *more} - {None}
    assert end_tokens(fresh_base.model, fresh_base.tokenizer) == sorted(expected)


def test_the_end_token_pads_only_where_there_is_no_pad_token(base: Base) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    own = tokenizer.pad_token
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == own != tokenizer.eos_token
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("outer", [False, True])
def test_trainers_get_a_tokenizer_that_adds_no_end(base: Base, outer: bool) -> None:
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
    assert tokenizer("a b")["input_ids"] == [first, *plain, end]  # the saved one stays


def test_a_template_names_an_end_that_the_model_does_not(fresh_base: Base) -> None:
    """A base learns chats whose turns end with another token than its texts."""
    tokenizer, model = copy.deepcopy(fresh_base.tokenizer), fresh_base.model
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    set_end_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == sorted({turn, tokenizer.eos_token_id})
