"""A saved adapter fits its base in every weight, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_exp.adapter.mounting import add, fitting, put, read_config
from lora_exp.errors import AdapterError

Trained = Callable[..., Path]


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    shutil.copytree(trained("peft=lora") / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LORRA"}, "LORRA"),
        ({"r": 0}, "does not fit this base"),
        ({"target_modules": ["c_attn"]}, "does not fit this base: Target modules"),
    ],
)
def test_a_config_that_peft_cannot_use_is_told(
    folder: Path, fresh_base: Any, changes: dict[str, Any], said: str
) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=said):
        put(fresh_base.model, read_config(str(folder), fresh_base.model), str(folder), False)


def test_a_second_adapter_is_held_to_the_same(
    folder: Path, trained: Trained, fresh_base: Any
) -> None:
    path = str(trained("peft=lora", "seed=7") / "adapter")
    model = put(fresh_base.model, read_config(path, fresh_base.model), path, False)
    add(model, str(folder), "second")
    own = peft.get_peft_model_state_dict(model, adapter_name="second", save_embedding_layers=False)
    wanted = load_file(folder / "adapter_model.safetensors")
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)


def test_an_error_without_words_is_told_by_its_kind() -> None:
    with (
        pytest.raises(AdapterError, match="mine does not fit this base: ValueError"),
        fitting("mine"),
    ):
        raise ValueError
