"""Products with the same bits for any number of rows: the real kernels, interpreted on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import compose, run
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError
from lora_exp.model import invariance
from scripts.architectures.models import make
from tests.conftest import ROOT
from tests.lockstep.runs import outputs, run_alone, run_packed

needs_kernels = pytest.mark.skipif(
    not find_spec("megatron") or not find_spec("triton"), reason="needs megatron-core and triton"
)
JOBS = [["peft.r=4"], ["peft.r=8", "targets=qv", "train.per_device_train_batch_size=3"]]


def interpreted(test: str, folder: Path) -> str:
    """Run a function of this file where Triton interprets its kernels; return its last line."""
    code = f"from tests.model import test_invariance as t; t.{test}({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def products(_: str) -> None:
    torch.manual_seed(0)
    layer, biased = torch.nn.Linear(96, 64, bias=False), torch.nn.Linear(96, 64)
    rows = torch.randn(2, 20, 96, requires_grad=True)
    before = layer(rows)
    invariance.start()
    for one in (layer, biased):
        all_rows = one(rows)
        (gradient,) = torch.autograd.grad(all_rows.sum(), rows)
        for n in (1, 3, 17):
            few = rows.detach()[:, :n].requires_grad_()
            assert torch.equal(one(few), all_rows[:, :n])
            assert torch.equal(torch.autograd.grad(one(few).sum(), few)[0], gradient[:, :n])
    doubles = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(
        doubles @ doubles.T, torch.mm(doubles, doubles.T, out=torch.empty(0).double())
    )
    assert torch.equal(torch.addmm(doubles, doubles, torch.eye(4).double(), beta=2), 3 * doubles)
    assert torch.zeros(0, 4).mm(torch.ones(4, 2)).shape == (0, 2)
    used = layer(rows)
    invariance.stop()
    assert torch.equal(layer(rows), before)
    print(not torch.equal(used, before), (used - before).abs().max() < 1e-4)


@needs_kernels
def test_a_product_has_the_same_bits_whatever_its_number_of_rows(tmp_path: Path) -> None:
    assert interpreted("products", tmp_path) == "True tensor(True)"


def packed(folder: str) -> None:
    make("llama", Path(folder) / "base")  # the interpreter is slow
    settings = ["batch_invariant=true", "train.max_steps=2", "samples.rows=0", "data=jsonl"]
    settings += ["model=local", f"model.path={folder}/base", f"data.path={folder}/rows.jsonl"]
    settings += ["data.eval_share=0.2", "train.per_device_train_batch_size=2"]
    rows = [f'{{"prompt": "say {c}", "completion": "{c * 3}"}}' for c in "abcdefgh"]
    (Path(folder) / "rows.jsonl").write_text("\n".join(rows))
    results, pack = run_packed(JOBS, Path(folder) / "pack", *settings)
    for together, alone in zip(results, run_alone(JOBS, Path(folder), *settings), strict=True):
        assert outputs(together) == outputs(alone)
    assert not invariance.is_on()
    print(pack.passes.report()["products_together"])


@needs_kernels
def test_jobs_share_all_products_and_equal_their_runs_alone(tmp_path: Path) -> None:
    assert float(interpreted("packed", tmp_path)) == 1


def test_without_a_gpu_or_its_package_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("megatron") is None:
        with pytest.raises(
            ConfigError, match=r"batch_invariant: needs the package megatron-core: pip"
        ):
            compose("batch_invariant=true")
    monkeypatch.setattr("lora_exp.config.ranges.find_spec", lambda name: name)
    cfg = compose("tracking=none", "batch_invariant=true")
    if not torch.cuda.is_available():
        with pytest.raises(
            ConfigError, match="batch_invariant: its kernels need a GPU; leave it out"
        ):
            run(cfg, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="batch_invariant: 1 is neither true nor false"):
        compose("batch_invariant=1")
    assert (
        fingerprint(cfg) != fingerprint(compose()) == fingerprint(compose("batch_invariant=false"))
    )


def test_the_record_says_it(quick_run: Callable[..., Any]) -> None:
    record = (quick_run("train.max_steps=1", "samples.rows=0").directory / "run.json").read_text()
    assert '"batch_invariant": false' in record
