"""A checkpoint holds all that trains, by its own names, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_exp import compose, run
from lora_exp.errors import CheckpointError
from lora_exp.training.manifest import seal
from tests.test_experiment import copied, digest, mark_killed
from tests.training.test_checkpoint import BEST, EVERY_STEP, owner_of, resume_from_step_2

EXPERTS = MixtralConfig(
    vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    max_position_embeddings=512,
)  # fmt: skip


def test_experts_that_are_published_by_other_names_are_resumed_bit_for_bit(
    quick_run: Callable[..., Any], folder_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    base = ["model=local", f"model.path={folder_of(EXPERTS)}", "peft=none"]
    settings = [s for s in (*EVERY_STEP, *BEST, *base) if not s.startswith("peft.")]
    settings += ["train.max_steps=4", "train.learning_rate=0.3", "train.warmup_steps=0"]
    uninterrupted = quick_run(*settings, name="whole")
    best = json.loads((uninterrupted.directory / "run.json").read_text())["best"]
    assert best["step"] < 4  # so the best weights are loaded, too
    cut = copied(uninterrupted, tmp_path / "cut")
    resume_from_step_2(cut)
    assert digest(cut.saved) == digest(uninterrupted.saved)
    published = load_file(cut.saved / "model.safetensors")
    kept = load_file(cut.directory / best["checkpoint"] / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in published
    assert torch.equal(
        published["model.layers.0.block_sparse_moe.experts.3.w2.weight"],
        kept["model.layers.0.mlp.experts.down_proj"][3],
    )
    opened = AutoModelForCausalLM.from_pretrained(cut.directory / best["checkpoint"])
    saved = AutoModelForCausalLM.from_pretrained(cut.saved)
    assert all(map(torch.equal, opened.parameters(), saved.parameters()))


def test_a_weight_missing_from_a_checkpoint_is_named(quick_run: Callable[..., Any]) -> None:
    settings = [s for s in EVERY_STEP if not s.startswith("peft.")]
    cut = quick_run(*settings, "peft=none", "train.max_steps=2")
    folder = cut.directory / "checkpoints/checkpoint-2"
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seal(folder, owner_of(cut.directory), 2)
    mark_killed(cut.directory)
    with pytest.raises(CheckpointError, match=r"does not hold model\.layers\.1\.mlp\.up_proj"):
        run(compose(f"resume={cut.directory}"))


def test_an_encoder_missing_from_a_checkpoint_is_named(quick_run: Callable[..., Any]) -> None:
    cut = quick_run(*EVERY_STEP, "peft=p_tuning", "train.max_steps=2")
    folder = cut.directory / "checkpoints/checkpoint-2"
    (folder / "trained.safetensors").unlink()
    seal(folder, owner_of(cut.directory), 2)
    mark_killed(cut.directory)
    with pytest.raises(CheckpointError, match=r"does not hold .*prompt_encoder.*; start a new run"):
        run(compose(f"resume={cut.directory}"))
