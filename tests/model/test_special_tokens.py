"""What ends an answer and pads a batch is decided in one place."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lora_exp.model.loading import Base
from lora_exp.model.special_tokens import end_tokens, ensure_pad_token


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
