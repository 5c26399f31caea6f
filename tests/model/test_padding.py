"""Whether a base sees the padding ahead of a prompt is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    xLSTMConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM

from lora_exp.errors import ConfigError
from lora_exp.model.loading import load
from lora_exp.model.padding import sees_padding
from lora_exp.training.answers import batches

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
RWKV = RwkvConfig(**SMALL | {"num_hidden_layers": 7, "vocab_size": 512}, attention_hidden_size=32)
LOCAL = {
    "revision": None, "gguf_file": None, "dtype": "float32", "attn_implementation": "auto",
    "trust_remote_code": False, "random_weights": False, "quantization": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sees"),
    [
        (LlamaConfig(**SMALL, num_attention_heads=2, intermediate_size=64), False),
        (GPT2Config(vocab_size=300, n_layer=2, n_head=2, n_embd=32), False),
        (BloomConfig(**SMALL, n_head=2), False),
        (MambaConfig(**SMALL, state_size=4), False),
        (T5Config(vocab_size=300, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16), False),
        (RWKV, True),
        (xLSTMConfig(**SMALL, num_heads=2, chunk_size=8, mode="inference"), True),
        (RecurrentGemmaConfig(**SMALL, num_attention_heads=2, lru_width=32), True),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_padding_is_hidden_or_not(config: Any, sees: bool) -> None:
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).train()
    before = torch.random.get_rng_state()
    assert sees_padding(model) == sees
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


@pytest.fixture
def rwkv(folder_of: Callable[[Any], Path]) -> Path:
    return folder_of(RWKV)


def test_prompts_of_several_lengths_share_no_batch_if_they_would_see_padding(rwkv: Path) -> None:
    model = load(str(rwkv), **LOCAL).model
    prompts = [[5] * 4, [6] * 2, [7] * 4, [8] * 4]
    assert batches(prompts, model, 2) == [[1], [0, 2], [3]]
    model.sees_padding = False
    assert batches(prompts, model, 2) == [[1, 0], [2, 3]]


def test_grpo_is_refused_if_prompts_would_see_their_padding(
    quick_run: Callable[..., Any], rwkv: Path
) -> None:
    options = ["algorithm=grpo", "algorithm.rewards=[lora_exp.rewards.exact_match]"]
    options += ["train.per_device_train_batch_size=8"]
    with pytest.raises(ConfigError, match="RwkvForCausalLM sees the padding of prompts"):
        quick_run("model=local", f"model.path={rwkv}", *options)


def test_weights_are_the_same_in_training_and_in_evaluation(rwkv: Path) -> None:
    """RWKV halves some in evaluation, but not an adapter's: it would count twice as much."""
    model = load(str(rwkv), **LOCAL).model
    ids = torch.arange(5, 25)[None]
    trained = model.train()(ids).logits
    assert torch.equal(model.eval()(ids).logits, trained)
    read = AutoModelForCausalLM.from_pretrained(rwkv).eval()
    assert torch.allclose(read(ids).logits, trained, atol=1e-5)
