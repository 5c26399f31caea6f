"""A chat template is code from elsewhere, and gets a few seconds."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest

from lora_exp.data.examples import raw
from lora_exp.errors import DataError
from tests.data.test_tokens import chat, counted


def test_a_template_that_does_not_end_is_stopped(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = 3 * loop + "{{ i }}" + 3 * "{% endfor %}"
    began = time.perf_counter()
    with pytest.raises(DataError, match="the chat template does not end within 3 s"):
        counted(chat("q", "a"), tokenizer)
    rows = [{"prompt": chat("q")["messages"], "answer": "a"}]
    with pytest.raises(DataError, match="the chat template does not end within 3 s"):
        raw(rows, "prompt", tokenizer)  # of trainers that render rows themselves
    assert time.perf_counter() - began < 10
