"""The contract on other processors: simulated ones, and this one with other settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.model.processor import processor as here
from tests.conftest import ROOT
from tests.lockstep.processors import Product, banded, combed, placed, processor
from tests.lockstep.test_pack import COMMON, alone, computed, packed

BATCHES = (1, 2, 3, 4, 6)
SHORT = [*COMMON, "train.max_steps=2", "samples.rows=2", "data.max_eval_rows=4"]
TARGETS = ("qv", "all_linear", "attention", "mlp", "all_linear")
JOBS = [
    [f"peft.r={4 + n}", f"targets={targets}", f"train.per_device_train_batch_size={batch}"]
    for n, (targets, batch) in enumerate(zip(TARGETS, BATCHES, strict=True))
]


def hold_the_contract(folder: Path, *settings: str) -> float:
    """Train jobs of all batches together and alone, and return how many products were shared."""
    results, pack = packed(JOBS, folder / "pack", *settings, every=SHORT)
    for ours, theirs in zip(results, alone(JOBS, folder, *settings, every=SHORT), strict=True):
        assert computed(ours) == computed(theirs)
    assert pack.passes.counts["most jobs"] == len(JOBS)
    return float(pack.passes.report()["products_together"])


@pytest.mark.parametrize(
    ("product", "setting"),
    [
        (banded, "model.dtype=bfloat16"),
        (combed, "model.dtype=bfloat16"),
        (combed, "quant=nf4"),
        (combed, "quant=none"),
        (placed, "quant=none"),
    ],
)
def test_a_pack_keeps_the_contract_on_a_processor_with_bands(
    tmp_path: Path, product: Product, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))  # of another processor
    with processor(product):  # ten steps meet the narrow bands
        shared = hold_the_contract(tmp_path, setting, "train.max_steps=10")
    assert shared > 0


CODE = """
import sys
from pathlib import Path
import torch
from tests.lockstep.test_processors import hold_the_contract

for setting in sys.argv[2:]:
    shared = hold_the_contract(Path(sys.argv[1]) / setting, setting)
    print(f"{torch.get_num_threads()} threads, {setting}: {shared:.0%} of products together")
"""
ISAS = {"AVX512_CORE": "avx512bw", "AVX512_CORE_BF16": "avx512_bf16"}  # and the flag they need
SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "3 threads": {"OMP_NUM_THREADS": "3"},
    "4 threads": {"OMP_NUM_THREADS": "4"},
    "rows by fours": {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
    **{isa: {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": isa} for isa in ISAS},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_pack_keeps_the_contract_under_every_setting_of_this_processor(
    tmp_path: Path, setting: str
) -> None:
    flags = here().get("flags", "").split()
    if setting in ISAS and ISAS[setting] not in flags:
        pytest.skip(f"this processor has no {ISAS[setting]}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | SETTINGS[setting]
    kinds = ["model.dtype=bfloat16", "quant=nf4"]
    kinds += [] if setting in ISAS else ["quant=none"]  # oneDNN computes no float32
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), *kinds],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [int(n) for n in re.findall(r"(\d+)% of products together", done.stdout)]
    assert len(shares) == len(kinds)
    assert max(shares) > 0
