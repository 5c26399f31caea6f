"""Whether packed rows attend to each other is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_exp.errors import ConfigError
from lora_exp.model.packing import TOKENS, keeps_rows_apart

SMALL = {"vocab_size": 300, "initializer_range": 0.2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
BLOOM = BloomConfig(**SMALL, n_layer=2, n_head=2, hidden_size=32)
WIDE = {"intermediate_size": 64, "num_key_value_heads": 2}
NEO = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "window_size": 24}
NEO |= {"attention_types": [[["global", "local"], 1]]}
CHUNKS = {"attention_chunk_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 2}
CHUNKS |= {"head_dim": 16, "pad_token_id": 0}


def model_from(config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).train()


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (LlamaConfig(**SMALL, **LAYERS, **WIDE), True),
        (Qwen3Config(**SMALL, **LAYERS, **WIDE, head_dim=16), True),
        (GPT2Config(**SMALL, n_layer=2, n_head=2, n_embd=32), True),
        (FalconConfig(**SMALL, **LAYERS, alibi=False), False),
        (FalconConfig(**SMALL, **LAYERS, alibi=True), False),
        (BLOOM, False),
        (MptConfig(**SMALL, n_layers=2, n_heads=2, d_model=32), False),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_architectures_that_keep_rows_apart_are_detected(config: Any, apart: bool) -> None:
    model = model_from(config)
    before = torch.random.get_rng_state()
    assert keeps_rows_apart(model) == apart
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (LlamaConfig(**SMALL, **LAYERS, **WIDE, max_position_embeddings=64), True),
        (GPT2Config(**SMALL, n_layer=2, n_head=2, n_embd=32, n_positions=64), True),
        # a causal mask of fixed size
        (GPTNeoConfig(**SMALL, **NEO, max_position_embeddings=64), False),
        # attends in chunks, of each row
        (Llama4TextConfig(**SMALL, **LAYERS, **WIDE, **CHUNKS), True),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_architectures_that_end_at_their_context_are_detected(config: Any, apart: bool) -> None:
    model = model_from(config)
    assert keeps_rows_apart(model)
    assert keeps_rows_apart(model, 56) == apart


def test_rows_stay_apart_with_eager_attention_and_in_bfloat16() -> None:
    config = LlamaConfig(**SMALL, **LAYERS, **WIDE)
    assert keeps_rows_apart(model_from(config, attn_implementation="eager"))
    assert keeps_rows_apart(model_from(config, dtype=torch.bfloat16))


def test_packing_is_refused_if_rows_attend_to_each_other(
    quick_run: Callable[..., Any], tmp_path: Path, base: Any
) -> None:
    config = FalconConfig(**SMALL | {"vocab_size": 512}, **LAYERS, alibi=True)
    model_from(config).save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    model = ["model=local", f"model.path={tmp_path / 'base'}"]
    for key in ("packing=true", "+padding_free=true"):
        sign, name = ("+", key[1:]) if key[0] == "+" else ("", key)
        with pytest.raises(ConfigError, match="FalconForCausalLM does not keep rows apart"):
            quick_run(*model, f"{sign}algorithm.args.{name}", name=name.partition("=")[0])


def test_the_packed_rows_are_given_as_training_gives_them() -> None:
    """With all of TRL's arguments: a convolution may refuse the numbers of rows, for instance."""
    model = model_from(LlamaConfig(**SMALL, **LAYERS, **WIDE))
    calls: list[dict[str, Any]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, arguments: calls.append(arguments), with_kwargs=True
    )
    keeps_rows_apart(model, ahead=2 * TOKENS)
    hook.remove()
    ids = calls[1]["input_ids"][0].tolist()
    rows = [{"input_ids": ids[i : i + TOKENS]} for i in range(0, 3 * TOKENS, TOKENS)]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    expected = collator(rows)
    del expected["labels"]
    given = {name: value for name, value in calls[1].items() if name != "use_cache"}
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(given[name]), torch.as_tensor(value)), name
