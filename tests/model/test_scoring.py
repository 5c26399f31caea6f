"""A classifier's score is read at the last token, for any pad token and padding side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    Llama4Config,
)

from lora_exp.errors import ConfigError
from lora_exp.model.scoring import last_token, register_classifier, scored_at_last_token
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


@pytest.mark.parametrize("kind", ["falcon_h1", "opt", "ctrl"])
def test_an_architecture_without_a_classifier_gets_a_head_on_its_body(
    kind: str, tmp_path: Path
) -> None:
    """OPT has one, but no range for the head's weights, and CTRL's head has another name.

    Falcon-H1's buffers are computed.
    """
    from lora_exp import compose, load_adapter, run
    from lora_exp.after.merging import merge
    from lora_exp.after.proof import prove

    base = save_base(kind, tmp_path / "base")
    values = ["model=local", f"model.path={base}", "tracking=none", "samples.rows=0"]
    values += ["data=demo_pairs", "data.rows=16", "data.eval_rows=4", "train.max_steps=2"]
    values += ["train.learning_rate=1e-2", "train.per_device_train_batch_size=4"]
    values += ["peft.target_modules=[in_proj]"] * (kind == "falcon_h1")
    saved = run(compose(*values, "algorithm=reward"), tmp_path / "reward").saved
    head = load_file(saved / "adapter_model.safetensors")["base_model.model.score.weight"]
    model, _ = load_adapter(saved)
    ids = torch.tensor([[5, 6, 7, 8]])
    body = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").base_model.eval()
    with torch.no_grad():
        score = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert score.isfinite().all()
        with model.disable_adapter():
            hidden = model.get_base_model().base_model(ids).last_hidden_state
        assert torch.allclose(hidden, body(ids).last_hidden_state, atol=1e-5)
    assert head.shape == (1, body.config.hidden_size)
    merged = merge([saved], tmp_path / "merged")
    assert prove(merged, [saved]).holds
    for folder in (saved, merged):
        in_card = loaded_as_its_card_says(folder)
        with torch.no_grad():
            again = in_card(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(again, score, atol=1e-4)


def loaded_as_its_card_says(folder: Path) -> Any:
    """Run the code of a model card."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names["model"].eval()


def save_base(kind: str, folder: Path) -> Path:
    """Save a tiny model of random weights, with the embedded tokenizer."""
    sizes: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "ctrl": {"n_embd": 32, "dff": 64, "n_layer": 1, "n_head": 4, "n_positions": 512},
        "falcon_h1": {
            "intermediate_size": 64, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
            "mamba_d_state": 8, "mamba_n_groups": 1, "head_dim": 8, "num_key_value_heads": 2,
        },
    }  # fmt: skip
    common = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": 2}
    common |= {"num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **common, **sizes[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny().tokenizer.save_pretrained(folder)
    return folder


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


def test_a_class_that_only_answers_has_no_body_for_a_head() -> None:
    with pytest.raises(ValueError, match=r"Llama4Config has no body to put a head on, only Llama4"):
        register_classifier(Llama4Config())


def test_an_encoder_decoder_has_no_reward_head(t5: Path) -> None:
    with pytest.raises(ConfigError, match="an encoder-decoder has no head that scores texts"):
        tiny(path=str(t5), task_type="SEQ_CLS")
