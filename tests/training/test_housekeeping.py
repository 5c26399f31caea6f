"""Skipping walks over all modules changes no result."""

from __future__ import annotations

from typing import Any

import peft
import torch

from lora_exp.training.housekeeping import avoid_module_walks


def test_modes_counts_and_gradients_stay_the_same(fresh_base: Any) -> None:
    model = peft.get_peft_model(fresh_base.model, peft.LoraConfig(target_modules=["q_proj"]))
    names = [id(p) for p in model.parameters()]
    count = fresh_base.model.num_parameters(exclude_embeddings=True)
    assert len({m.training for m in model.modules()}) == 2  # base: eval, new layers: train
    avoid_module_walks(model)
    assert len({m.training for m in model.modules()}) == 1
    assert [id(p) for p in model.parameters()] == names
    assert fresh_base.model.num_parameters(exclude_embeddings=True) == count
    assert fresh_base.model.num_parameters() != count
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert {m.training for m in model.modules()} == {mode}
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
