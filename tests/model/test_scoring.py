"""A classifier's score is read at the last token, for any pad token and padding side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from lora_exp.model.scoring import last_token, scored_at_last_token
from tests.conftest import tiny


def test_the_last_token_is_found_beside_padding_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert last_token(mask).tolist() == [2, 3, 3, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_if_the_end_token_is_the_pad_token_the_score_is_at_the_first_end(side: str) -> None:
    base = tiny(task_type="SEQ_CLS")
    model, tokenizer = base.model.eval(), base.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = end = tokenizer.eos_token_id
    rows = [[5, 9, 101, end], [7, end], [8, 12, 300, 44, 7, 90, end]]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        scores = model(**inputs, position_ids=positions).logits[:, 0]
        for row, score in zip(rows, scores, strict=True):
            hidden = model.base_model(torch.tensor([row])).last_hidden_state[0, -1]
            assert float(model.score(hidden)) == pytest.approx(float(score), abs=1e-5)


def test_with_a_separate_pad_token_scores_equal_transformers_bit_for_bit() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_layer=2, n_head=2, n_embd=32, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.__class__ = scored_at_last_token(type(model))
        assert torch.equal(model(**inputs).logits, expected)
        assert model(**inputs, labels=torch.ones(2)).loss is not None
    assert type(model).__name__ == "GPT2ForSequenceClassification"


def test_a_reward_is_trained_measured_and_used_at_the_same_token(
    tmp_path: Path,
) -> None:
    from lora_exp import compose, load_adapter, run
    from lora_exp.adapter.attach import attach
    from lora_exp.model.loading import base_of
    from lora_exp.rewards import AdapterReward

    base = tiny()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.pad_token = base.tokenizer.eos_token
    base.tokenizer.save_pretrained(tmp_path / "base")
    model_overrides = ["model=local", f"model.path={tmp_path / 'base'}"]
    reward = ["algorithm=reward", "data=demo_pairs", "data.rows=64", "train.max_steps=4"]
    cfg = compose("tracking=none", *model_overrides, *reward, "train.learning_rate=1e-2")
    saved = run(cfg, tmp_path / "run").saved
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    model, tokenizer = load_adapter(saved)
    row = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        inner = model.get_base_model()
        hidden = inner.base_model(row["input_ids"]).last_hidden_state[0, -1]
        expected = float(inner.score(hidden))
        assert float(model(**row).logits) == pytest.approx(expected, abs=1e-5)
    cfg = compose(
        "tracking=none", *model_overrides, "algorithm=grpo", f"algorithm.rewards=[{saved}]"
    )
    other = base_of(cfg)
    policy = attach(other, cfg, tmp_path)
    rewards = AdapterReward(str(saved), cfg, policy.model, other.tokenizer, "reward")
    assert rewards([turns[:1]], [turns[1:]])[0] == pytest.approx(expected, abs=1e-4)
