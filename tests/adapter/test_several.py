"""Several adapters on one base: their outputs, and that the trained one is not affected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

from lora_exp.adapter.several import (
    add_copy,
    add_saved,
    changes_nothing,
    save_classifier,
    score,
    using,
)
from lora_exp.errors import AdapterError

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def model(fresh_base: Any) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(fresh_base.model, LoraConfig(r=4, target_modules=TARGETS))
    assert changes_nothing(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert not changes_nothing(adapted)
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=torch.arange(8)[None]).logits
    return output


def trainable_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_frozen_copy_does_not_change_with_the_adapter(model: Any) -> None:
    before, trainable = logits(model), trainable_names(model)
    add_copy(model, "ref", trainable=False)
    assert trainable_names(model) == trainable
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 1
    assert not torch.equal(logits(model), before)
    with using(model, "ref"):
        assert torch.equal(logits(model), before)
    assert trainable_names(model) == trainable


def test_a_trainable_copy_starts_at_zero_and_is_trained_too(model: Any) -> None:
    trainable = trainable_names(model)
    add_copy(model, "value", trainable=True)
    new = {name.replace(".default.", ".value.") for name in trainable}
    assert trainable_names(model) == trainable | new
    with using(model, None):
        bare = logits(model)
    with using(model, "value"):
        assert torch.equal(logits(model), bare)
    assert trainable_names(model) == trainable | new
    assert model.active_adapter == "default"


def test_the_active_adapter_is_restored_after_an_error(model: Any) -> None:
    trainable = trainable_names(model)
    add_copy(model, "ref", trainable=False)
    with pytest.raises(RuntimeError), using(model, "ref"):
        raise RuntimeError
    assert (model.active_adapter, trainable_names(model)) == ("default", trainable)


def test_a_saved_classifier_is_loaded_with_its_head(
    model: Any, fresh_base: Any, tmp_path: Path
) -> None:
    head, before = torch.randn(1, 192), logits(model)
    save_classifier(model, "default", head, fresh_base, tmp_path)
    trainable = trainable_names(model)
    assert torch.equal(add_saved(model, tmp_path, "again"), head)
    assert trainable_names(model) == trainable
    with using(model, "again"):
        assert torch.equal(logits(model), before)


def test_methods_that_allow_one_adapter_are_refused(
    fresh_base: Any, model: Any, tmp_path: Path
) -> None:
    save_classifier(model, "default", torch.randn(1, 192), fresh_base, tmp_path)
    model.unload()
    other = get_peft_model(
        model.get_base_model(), IA3Config(target_modules=TARGETS, feedforward_modules=[])
    )
    with pytest.raises(AdapterError, match="LORA beside IA3 cannot share a base"):
        add_saved(other, tmp_path, "reward")


def test_adalora_allows_one_adapter(fresh_base: Any) -> None:
    config = AdaLoraConfig(target_modules=TARGETS, total_step=10)
    with pytest.raises(AdapterError, match="ADALORA allows one adapter on a base"):
        add_copy(get_peft_model(fresh_base.model, config), "ref", trainable=False)


def test_a_score_is_read_at_the_last_token_of_each_row() -> None:
    hidden = torch.arange(6.0).reshape(1, 3, 2).repeat(2, 1, 1)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert score(hidden, mask, torch.tensor([[1.0, 10.0]])).tolist() == [32.0, 54.0]
