"""Metrics of held-out rows: which answer of a pair the model prefers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_exp.errors import ConfigError
from lora_exp.training import measure
from lora_exp.training.measure import objective_name, preferences

ARGS = SimpleNamespace(per_device_eval_batch_size=4)


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_random_states_are_those_from_before_a_measurement() -> None:
    draws = []
    for _ in range(2):
        with measure._kept_random_state():
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_the_model_prefers_answers_it_would_give(base: Any) -> None:
    correct = [
        pair("Reverse: a b c", "c b a", "a b c"),
        pair("Repeat: a b c d", "a b c d", "d c b a"),
        pair("What is the capital of France?", "Paris", "Rome"),
    ]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in correct]
    assert preferences(base.model, base.tokenizer, correct, ARGS) == [True] * 3
    assert preferences(base.model, base.tokenizer, swapped, ARGS) == [False] * 3
    mixed = [correct[2], *swapped[:2], correct[1]]  # neither from long to short nor back
    expected = [True, False, False, True]
    for rows in (2, 4, 8):
        args = SimpleNamespace(per_device_eval_batch_size=rows)
        assert preferences(base.model, base.tokenizer, mixed, args) == expected


def test_plain_texts_are_compared_too(base: Any) -> None:
    start = "<|im_start|>user\nReverse: a b c<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": start, "chosen": "c b a", "rejected": "b a c"}
    assert preferences(base.model, base.tokenizer, [row], ARGS) == [True]


def test_logits_computed_in_parts_give_the_same_accuracy(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihoods are equal however few logits are in memory at a time."""
    rows = [
        pair("Reverse: a b c", "c b a", "a b c"),
        pair("Repeat: a", "a", "a quite long answer that goes on and on"),
        pair("What is the capital of France?", "Paris", "Rome"),
    ]
    sequences = [
        measure.encoded(row, key, base.tokenizer) for row in rows for key in row if key[0] != "p"
    ]
    expected = []
    for ids, start in sequences:
        with torch.no_grad():
            logprobs = base.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        expected.append(float(chosen[start - 1 :].sum()))
    likelihoods = measure._likelihoods(base.model, base.tokenizer, sequences)
    assert likelihoods.tolist() == pytest.approx(expected, abs=1e-3)
    accuracy = preferences(base.model, base.tokenizer, rows, ARGS)
    monkeypatch.setattr(measure, "LOGITS", 1)
    shapes = []
    hook = base.model.lm_head.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    try:
        assert preferences(base.model, base.tokenizer, rows, ARGS) == accuracy
    finally:
        hook.remove()
    assert all(rows == 1 for rows, *_ in shapes)
    assert max(tokens for _, tokens, _ in shapes) < max(len(ids) for ids, _ in sequences)


def test_without_held_out_rows_the_objective_is_the_training_loss() -> None:
    assert objective_name("eval/reward", {}, None) == "train/loss"
    with pytest.raises(ConfigError, match=r"'eval/rewrd' is none of .* \(did you mean eval/reward"):
        objective_name("eval/rewrd", {"before/reward": 0.1}, None or SimpleNamespace())  # type: ignore[arg-type]
