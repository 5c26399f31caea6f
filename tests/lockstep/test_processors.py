"""The contract on other processors: simulated ones, and this one with other settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.model.processor import processor
from tests.conftest import FLOAT32, ROOT, computes_bfloat16_fast, in_fast_dtype
from tests.lockstep.processors import (
    Product,
    band_linear,
    last_rows_linear,
    narrow_bands_linear,
    simulated_processor,
)
from tests.lockstep.runs import COMMON, outputs, run_alone, run_packed

BATCHES = (1, 2, 3, 4, 6)
SHORT = [*COMMON, "train.max_steps=2", "samples.rows=2", "data.max_eval_rows=4"]
TARGETS = ("qv", "all_linear", "attention", "mlp", "all_linear")
JOBS = [
    [f"peft.r={4 + n}", f"targets={targets}", f"train.per_device_train_batch_size={batch}"]
    for n, (targets, batch) in enumerate(zip(TARGETS, BATCHES, strict=True))
]


def shared_products(folder: Path, *settings: str) -> float:
    """Assert that all jobs equal their runs alone, and return the share of shared products."""
    results, pack = run_packed(JOBS, folder / "pack", *settings, defaults=SHORT)
    for packed, alone in zip(
        results, run_alone(JOBS, folder, *settings, defaults=SHORT), strict=True
    ):
        assert outputs(packed) == outputs(alone)
    assert pack.passes.counts["most jobs"] == len(JOBS)
    return float(pack.passes.report()["products_together"])


@pytest.mark.parametrize(
    ("product", "setting"),
    [
        (band_linear, "model.dtype=bfloat16"),
        (narrow_bands_linear, "model.dtype=bfloat16"),
        (narrow_bands_linear, "quant=nf4"),
        (narrow_bands_linear, "quant=none"),
        (last_rows_linear, "quant=none"),
    ],
)
def test_a_pack_keeps_the_contract_on_a_processor_with_bands(
    tmp_path: Path, product: Product, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))  # apart from this processor's
    steps = 10 if product is narrow_bands_linear else 3  # ten reach the narrow bands
    with simulated_processor(product):
        shared = shared_products(tmp_path, *in_fast_dtype(setting), f"train.max_steps={steps}")
    assert shared > 0


CODE = """
import gc
import sys
from pathlib import Path
import torch
import trl.trainer.sft_trainer
from tests.lockstep.test_processors import shared_products

gc.freeze()  # each of the many runs collects garbage three times
for setting in sys.argv[2:]:
    shared = shared_products(Path(sys.argv[1]) / setting, *setting.split())
    print(f"{torch.get_num_threads()} threads, {setting}: {shared:.0%} of products together")
"""
ISAS = {
    "AVX512_CORE": "avx512bw",
    "AVX512_CORE_BF16": "avx512_bf16",
}  # and the flag that each needs
SETTINGS = {  # beside one thread, which the other tests of the contract have
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "4 threads": {"OMP_NUM_THREADS": "4"},
    "rows by fours": {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
    **{isa: {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": isa} for isa in ISAS},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_pack_keeps_the_contract_under_every_setting_of_this_processor(
    tmp_path: Path, setting: str
) -> None:
    flags = processor().get("flags", "").split()
    if setting in ISAS and ISAS[setting] not in flags:
        pytest.skip(f"this processor has no {ISAS[setting]}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | SETTINGS[setting]
    # nf4 computes in bfloat16, by oneDNN, and where that is slow in float32, by MKL as quant=none
    nf4 = "quant=nf4" if computes_bfloat16_fast() else f"quant=nf4 {FLOAT32}"
    settings = [] if "MKL_CBWR" in SETTINGS[setting] else [nf4]
    settings += ["model.dtype=bfloat16"] if setting in ISAS else ["quant=none"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), *settings],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [int(n) for n in re.findall(r"(\d+)% of products together", done.stdout)]
    assert len(shares) == len(settings)
    assert max(shares) > 0
