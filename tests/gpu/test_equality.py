"""On a GPU equal runs have equal bytes, a pack's jobs those of their runs alone, as on a CPU."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import compose, run
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.model import invariance
from lora_exp.model.determinism import WORKSPACE
from tests.lockstep.runs import COMMON, DIVERSE_JOBS, outputs, run_alone, run_packed

CHECKPOINTING = ["train.gradient_checkpointing=true", "model.dtype=bfloat16"]


def test_equal_runs_have_equal_bytes(tmp_path: Path) -> None:
    first, second = (
        run(compose(*COMMON, *DIVERSE_JOBS[2], "model.dtype=bfloat16"), tmp_path / name)
        for name in "ab"
    )
    assert outputs(first) == outputs(second)
    record = (first.directory / "run.json").read_text()
    assert '"deterministic": true' in record
    assert WORKSPACE in record
    assert torch.cuda.get_device_name() in record


needs_kernels = pytest.mark.skipif(not find_spec("megatron"), reason="needs megatron-core")


@needs_kernels
def test_products_and_means_have_the_same_bits_for_any_number_of_rows() -> None:
    rows = torch.randn(700, 1024, device="cuda")
    layer = torch.nn.Linear(1024, 3000, device="cuda", dtype=torch.bfloat16)
    exact = rows.bfloat16().double() @ layer.weight.double().T + layer.bias.double()
    invariance.start()
    try:
        products, means = layer(rows.bfloat16()), rows.pow(2).mean(-1, keepdim=True)
        for n in (1, 2, 17, 129, 300):
            assert torch.equal(layer(rows[:n].bfloat16()), products[:n])
            assert torch.equal(rows[:n].pow(2).mean(-1, keepdim=True), means[:n])
    finally:
        invariance.stop()
    assert (products - exact).abs().max() < exact.abs().max() / 100
    assert torch.allclose(means, rows.pow(2).mean(-1, keepdim=True))


@pytest.mark.parametrize(
    "setting",
    [
        ["quant=none"], ["model.dtype=bfloat16"], ["quant=nf4"], ["quant=int8"], CHECKPOINTING,
        pytest.param(["batch_invariant=true", "model.dtype=bfloat16"], marks=needs_kernels),
        pytest.param(["batch_invariant=true", "quant=nf4"], marks=needs_kernels),
    ],
    ids=lambda setting: "+".join(setting),
)  # fmt: skip
def test_jobs_of_a_pack_equal_their_runs_alone(tmp_path: Path, setting: list[str]) -> None:
    results, pack = run_packed(DIVERSE_JOBS, tmp_path / "pack", *setting)
    for packed, alone in zip(results, run_alone(DIVERSE_JOBS, tmp_path, *setting), strict=True):
        assert outputs(packed) == outputs(alone)
    assert pack.passes.counts["most jobs"] == 4  # passes were shared


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_resumed_run_has_the_bytes_of_one_that_was_not_interrupted(
    tmp_path: Path, quant: str
) -> None:
    steady = ["train.lr_scheduler_type=constant", "train.warmup_steps=0", "peft.lora_dropout=0.1"]
    words = [*COMMON, *steady, f"quant={quant}", "train.save_strategy=steps", "train.save_steps=3"]
    whole = run(compose(*words, "train.max_steps=6"), tmp_path / "whole")
    run(compose(*words, "train.max_steps=3"), tmp_path / "cut")
    resumed = run(compose(f"resume={tmp_path / 'cut'}", "train.max_steps=6"))
    assert _adapter(resumed) == _adapter(whole)


def test_a_merged_model_is_its_adapter_on_its_base(tmp_path: Path) -> None:
    trained = run(compose(*COMMON, "train.learning_rate=3e-3"), tmp_path / "run")
    merged = merge([trained.directory], tmp_path / "merged")
    assert prove(merged, [trained.directory], max_new_tokens=8).holds


def test_the_switches_of_a_run_end_with_it(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled(), os.environ.get(WORKSPACE)
    run(compose(*COMMON, "train.max_steps=1", "samples.rows=0"), tmp_path / "run")
    assert (torch.are_deterministic_algorithms_enabled(), os.environ.get(WORKSPACE)) == before


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "reward", "grpo", "rloo", "ppo"])
def test_every_algorithm_trains(tmp_path: Path, algorithm: str) -> None:
    quick = ["train.max_steps=2", "samples.rows=0", "data.rows=64", "data.eval_rows=8"]
    result = run(compose("tracking=none", f"experiment=demo_{algorithm}", *quick), tmp_path / "run")
    assert result.saved


def _adapter(result: Any) -> str:
    content = (result.saved / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()
