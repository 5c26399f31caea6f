"""Which bases and adapters can share a pass, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from lora_exp.algorithm.ppo import PPOTrainer
from lora_exp.lockstep import proof
from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.eligibility import (
    adapter_obstacle,
    base_obstacle,
    fused_kinds,
    hooked,
    reads_padding,
)
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import PLAIN, ComputeState
from lora_exp.training.checkpoint import checkpointed
from tests.lockstep.kinds import KINDS, small_model

TRAINING = PassContext(PLAIN, True, False)
EVALUATION = PassContext(ComputeState(False, PLAIN.autocast), False, False)
# kinds whose layers cannot run once for all jobs while they train: only their products are shared
OWN_LAYERS = {"latent attention", "hybrid", "flat rows"}
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    yield
    PLAIN.restore()


@pytest.mark.parametrize("kind", KINDS)
def test_the_passes_of_these_kinds_are_exact(kind: str) -> None:
    model = small_model(kind)
    assert base_obstacle(model) is None
    fused = FusedBody(model.base_model, "exact")
    for context in (TRAINING, EVALUATION):
        assert fused.enter(context), fused.why_apart
    own_layers = OWN_LAYERS if AVX512 else OWN_LAYERS | {"odd width"}
    assert fused.own_layers[TRAINING] == (kind in own_layers)
    fused._set_context(TRAINING)
    assert any(TRAINING in linear.signatures for linear in fused.linears.values())


def test_a_base_without_layers_that_can_be_stopped_gives_the_reason() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert base_obstacle(model) == "it is an encoder with a decoder"
    llama = small_model("llama")
    llama.model.layers = nn.ModuleList()
    assert "GradientCheckpointingLayer" in (base_obstacle(llama) or "")


class Centred(nn.Module):
    """Mixes the rows of jobs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


def test_a_layer_that_mixes_rows_is_detected_and_products_are_still_shared() -> None:
    fused = FusedBody(small_model("llama").base_model, "exact")
    fused.blocks["layers.0"].input_layernorm = Centred()
    assert fused.enter(TRAINING)
    assert fused.own_layers[TRAINING]


def test_a_proof_that_raises_proves_nothing_and_keeps_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Any) -> str:
        raise ValueError("two\nlines")

    fused = FusedBody(small_model("llama").base_model, "exact")
    monkeypatch.setattr(proof, "difference", fail)
    assert not fused.enter(TRAINING)
    assert fused.why_apart == {TRAINING: "ValueError: two"}


def test_a_proof_that_runs_out_of_memory_or_is_interrupted_is_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (MemoryError(), KeyboardInterrupt()):

        def fail(_: Any, error: BaseException = error) -> str:
            raise error

        fused = FusedBody(small_model("llama").base_model, "exact")
        monkeypatch.setattr(proof, "difference", fail)
        with pytest.raises(type(error)):
            fused.enter(TRAINING)
        assert TRAINING not in fused.proven


def test_only_adapters_of_modules_that_run_for_all_jobs_are_an_obstacle() -> None:
    model = small_model("experts")
    fused = fused_kinds(model.base_model)
    experts = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    adapted = peft.get_peft_model(model, experts).get_base_model()
    assert adapter_obstacle(adapted.base_model, fused) is None
    dora = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(small_model("experts"), dora).get_base_model()
    obstacle = adapter_obstacle(adapted.base_model, fused)
    assert obstacle == "layers.0.self_attn.q_proj has DoraLinearVariant"


def test_hooks_that_capture_outputs_are_no_obstacle() -> None:
    model = small_model("experts")
    base = small_model("experts")
    model.base_model(input_ids=torch.ones(1, 3, dtype=torch.long), output_router_logits=True)
    assert hooked(model.base_model, base.base_model) == ""
    model.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "layers.0.mlp has the hook" in hooked(model.base_model, base.base_model)


def test_trainers_of_the_algorithms_mask_padding_and_others_may_not() -> None:
    class Own(trl.SFTTrainer):  # type: ignore[misc]
        pass

    for name in ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer"):
        assert not reads_padding(object.__new__(checkpointed(getattr(trl, name))))
    assert not reads_padding(object.__new__(checkpointed(PPOTrainer)))
    assert reads_padding(object.__new__(checkpointed(Own)))
    assert reads_padding(object.__new__(transformers.Trainer))
