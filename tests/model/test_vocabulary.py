"""A token without an embedding is an error before it is looked up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.errors import AdapterError, ConfigError
from lora_exp.model.vocabulary import missing_embeddings
from tests.conftest import tiny

Trained = Callable[..., Path]


def test_tokens_beyond_the_embeddings_are_named_in_their_order(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    rows = len(base.model.get_input_embeddings().weight)
    assert missing_embeddings(base.model, tokenizer) is None
    tokenizer.add_tokens([f"<t{i}>" for i in range(rows - len(tokenizer))])
    assert missing_embeddings(base.model, tokenizer) is None  # all rows are used
    tokenizer.add_tokens(["<z>", "<y>", "<x>", "<w>"])
    message = missing_embeddings(base.model, tokenizer)
    assert message is not None
    assert "tokens without an embedding ('<z>', '<y>', '<x>', ...): 4 beyond" in message


def test_a_base_with_such_tokens_is_not_trained(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny()
    base.model.save_pretrained(tmp_path / "base")
    rows = len(base.model.get_input_embeddings().weight)
    tokens = [f"<t{i}>" for i in range(rows + 1 - len(base.tokenizer))]
    base.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    base.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"^model\.path: .* without an embedding .*resize_token"):
        quick_run("model=local", f"model.path={tmp_path / 'base'}")


def test_an_adapter_saved_with_such_tokens_is_refused(trained: Trained, tmp_path: Path) -> None:
    from lora_exp import load_adapter
    from tests.after.copies import copy_run

    run = copy_run(trained("peft=lora"), tmp_path / "run")
    tokenizer = tiny().tokenizer
    tokenizer.add_tokens([f"<t{i}>" for i in range(600)])
    tokenizer.save_pretrained(run / "adapter")
    with pytest.raises(AdapterError, match=r"without an embedding .*save_embedding_layers=True"):
        load_adapter(run)
