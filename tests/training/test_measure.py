"""What is said of held-out rows: which answer of a pair the model would rather give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp.errors import ConfigError
from lora_exp.training import measure
from lora_exp.training.measure import objective, preference_accuracy

ARGS = SimpleNamespace(per_device_eval_batch_size=4)


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_the_model_prefers_what_it_would_say(base: Any) -> None:
    right = [
        pair("Reverse: a b c", "c b a", "a b c"),
        pair("Repeat: a b c d", "a b c d", "d c b a"),
        pair("What is the capital of France?", "Paris", "Rome"),
    ]
    wrong = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in right]
    assert preference_accuracy(base.model, base.tokenizer, right, ARGS) == 1
    assert preference_accuracy(base.model, base.tokenizer, wrong, ARGS) == 0
    assert preference_accuracy(base.model, base.tokenizer, [*right, wrong[0]], ARGS) == 0.75


def test_plain_texts_are_compared_too(base: Any) -> None:
    start = "<|im_start|>user\nReverse: a b c<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": start, "chosen": "c b a", "rejected": "b a c"}
    assert preference_accuracy(base.model, base.tokenizer, [row], ARGS) == 1


def test_a_large_vocabulary_is_measured_in_parts_to_the_same_share(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihoods are those of whole logits, however few of them are held at a time."""
    rows = [
        pair("Reverse: a b c", "c b a", "a b c"),
        pair("Repeat: a", "a", "a quite long answer that goes on and on"),
        pair("What is the capital of France?", "Paris", "Rome"),
    ]
    both = [
        measure.encoded(row, key, base.tokenizer) for row in rows for key in row if key[0] != "p"
    ]
    wanted = []
    for ids, start in both:
        with torch.no_grad():
            logs = base.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        chosen = logs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        wanted.append(float(chosen[start - 1 :].sum()))
    found = measure._likelihoods(base.model, base.tokenizer, both)
    assert found.tolist() == pytest.approx(wanted, abs=1e-3)
    whole = preference_accuracy(base.model, base.tokenizer, rows, ARGS)
    monkeypatch.setattr(measure, "LOGITS", 1)
    shapes = []
    hook = base.model.lm_head.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    try:
        assert preference_accuracy(base.model, base.tokenizer, rows, ARGS) == whole
    finally:
        hook.remove()
    assert all(rows == 1 for rows, *_ in shapes)
    assert max(tokens for _, tokens, _ in shapes) < max(len(ids) for ids, _ in both)


def test_without_held_out_rows_the_training_loss_judges() -> None:
    assert objective("eval/reward", {}, None) == "train/loss"
    with pytest.raises(ConfigError, match=r"'eval/rewrd' is none of .* \(did you mean eval/reward"):
        objective("eval/rewrd", {"before/reward": 0.1}, None or SimpleNamespace())  # type: ignore[arg-type]
