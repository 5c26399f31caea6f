"""Keys of other tools get a hint with our override, and that override works."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.words import OTHER_KEYS, key_hint
from lora_exp.errors import ConfigError

# of Hydra, or of other options than the default
ELSEWHERE = {
    "data=jsonl data.path", "hydra.run.dir", "algorithm.args.beta", "algorithm.rewards",
    "algorithm.args.num_generations",
}  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("lr=1e-3", "train.learning_rate=..."),
        ("+lr=1e-3", "train.learning_rate=..."),
        ("train.lr=1e-3", "train.learning_rate=..."),
        ("+train.lr=1e-3", "train.learning_rate=..."),
        ("epochs=3", "train.num_train_epochs=..."),
        ("train.epochs=3", "train.num_train_epochs=..."),
        ("max_steps=3", "train.max_steps=..."),
        ("batch_size=8", "train.per_device_train_batch_size=..."),
        ("+train.batch_size=8", "train.per_device_train_batch_size=..."),
        ("grad_accum=8", "train.gradient_accumulation_steps=..."),
        ("train.warmup=8", "train.warmup_steps=..."),
        ("optimizer=sgd", "train.optim=..."),
        ("max_length=256", "algorithm.args.max_length=..."),
        ("algorithm.max_seq_length=256", "algorithm.args.max_length=..."),
        ("train.max_length=256", "algorithm.args.max_length=..."),
        ("peft.rank=8", "peft.r=..."),
        ("+peft.rank=8", "peft.r=..."),
        ("rank=8", "peft.r=..."),
        ("peft.alpha=8", "peft.lora_alpha=..."),
        ("peft.dropout=0.1", "peft.lora_dropout=..."),
        ("+dataset=my.jsonl", "data=jsonl data.path=..."),
        ("output_dir=x", "hydra.run.dir=..."),
        ("model_name=gpt2", "model.path=..."),
        ("load_in_4bit=true", "quant=nf4"),
        ("+load_in_8bit=true", "quant=int8"),
        ("wandb=true", "tracking=wandb"),
        ("quant=4bit", "quant=nf4"),
        ("quant=8bit", "quant=int8"),
        ("quant=NF4", "quant=nf4"),
        ("peft=qlora", "peft=lora quant=nf4"),
        ("peft=LoRA", "peft=lora"),
        ("peft=full", "peft=none"),
        ("targets=all-linear", "targets=all_linear"),
        ("algorithm=SFT", "algorithm=sft"),
        ("tracking=off", "tracking=none"),
        ("data=rows.jsonl", "data=jsonl data.path=rows.jsonl"),
        ("data=me/rows", "data=hub data.path=me/rows"),
        ("model=Qwen/Qwen3-0.6B", "model=local model.path=Qwen/Qwen3-0.6B"),
        ("model=./mine", "model=local model.path=./mine"),
    ],
)
def test_a_common_key_of_other_tools_gets_the_right_hint(typed: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(typed)
    assert f"give {hint}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "+" not in str(caught.value).replace("+train", "")


@pytest.mark.parametrize("key", sorted(OTHER_KEYS.keys() - ELSEWHERE))
def test_the_key_in_a_hint_exists(key: str) -> None:
    section, _, name = key.rpartition(".")
    assert name in (OmegaConf.select(compose(), section) if section else compose())


def test_our_own_keys_get_no_hint() -> None:
    assert key_hint("train.learning_rate") is None
    assert key_hint("hydra.lr") is None


@pytest.mark.parametrize("key", ["train.nonsense", "peft.nonsense", "model.nonsense"])
def test_no_hint_suggests_a_plus_that_would_fail(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(f"{key}=1")
    assert f"+{key}" not in str(caught.value)
