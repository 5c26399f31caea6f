"""Products with the same bits for any number of rows: the real kernels, interpreted on a CPU."""

from __future__ import annotations

import json
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
from lora_exp.model.determinism import Switches, switched
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
    """Compare rows of several blocks of the kernels, which have 128 rows and 128 columns."""
    torch.manual_seed(0)
    layer, biased = torch.nn.Linear(96, 200, bias=False), torch.nn.Linear(96, 200)
    rows = torch.randn(1, 300, 96, requires_grad=True)
    before = layer(rows)
    invariance.start()
    for one in (layer, biased):
        all_rows = one(rows)
        (gradient,) = torch.autograd.grad(all_rows.sum(), rows)
        for n in (1, 3, 129, 257):
            few = rows.detach()[:, :n].requires_grad_()
            assert torch.equal(one(few), all_rows[:, :n])
            assert torch.equal(torch.autograd.grad(one(few).sum(), few)[0], gradient[:, :n])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(3, 4, dtype=dtype)
        assert torch.equal(x @ x.T, torch.mm(x, x.T, out=x.new_empty(0)))
    x, eye = torch.randn(3, 4), torch.eye(4)
    assert torch.equal(torch.addmm(x, x, eye, beta=2), 3 * x)
    seven = torch.tensor([7.0])
    for bias in (seven, seven.expand(4), torch.arange(8.0)[::2], torch.arange(4.0)):
        assert torch.equal(torch.addmm(bias, x, eye), x + bias)
    assert torch.zeros(0, 4).mm(eye).shape == (0, 4)
    used = layer(rows)
    invariance.stop()
    assert torch.equal(layer(rows), before)
    print(not torch.equal(used, before) and (used - before).abs().max() < 1e-4)


@needs_kernels
def test_a_product_has_the_same_bits_whatever_its_number_of_rows(tmp_path: Path) -> None:
    assert interpreted("products", tmp_path) == "tensor(True)"


def banded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply as a GPU that sums in another order for 15 to 30 rows, as the second job has."""
    if 15 <= len(a) <= 30:
        parts = (torch.mm(a[:, i::3], b[i::3], out=a.new_empty(0)).float() for i in range(3))
        return sum(parts, start=torch.zeros(())).to(a.dtype)
    return torch.mm(a, b, out=a.new_empty(0))


def packed(folder: str) -> None:
    make("llama", Path(folder) / "base")  # the interpreter is slow
    settings = ["model=local", f"model.path={folder}/base", f"data.path={folder}/rows.jsonl"]
    settings += ["train.max_steps=2", "samples.rows=0", "data=jsonl"]
    settings += ["data.eval_share=0.2", "train.per_device_train_batch_size=2"]
    rows = [f'{{"prompt": "say {c}", "completion": "{c * 3}"}}' for c in "abcdefgh"]
    (Path(folder) / "rows.jsonl").write_text("\n".join(rows))
    library: Any = torch.library.Library("aten", "IMPL")
    library.impl("mm", banded, "CPU")
    shares = []
    for value in ("false", "true"):
        own, place = [*settings, f"batch_invariant={value}"], Path(folder) / value
        results, pack = run_packed(JOBS, place / "pack", *own)
        for together, alone in zip(results, run_alone(JOBS, place, *own), strict=True):
            assert outputs(together) == outputs(alone)
        assert not invariance.is_on()
        record = json.loads((results[0].directory / "run.json").read_text())
        assert record["batch_invariant"] is (value == "true")
        assert ("megatron-core" in record["versions"]) is (value == "true")
        shares.append(pack.passes.report()["products_together"])
    print(*shares)


@needs_kernels
def test_jobs_share_all_products_and_equal_their_runs_alone(tmp_path: Path) -> None:
    without, with_kernels = map(float, interpreted("packed", tmp_path).split())
    assert without < with_kernels == 1


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
    for section in ("train", "algorithm.args"):
        with pytest.raises(ConfigError, match="batch_invariant: torch_compile makes kernels"):
            compose("batch_invariant=true", f"+{section}.torch_compile_backend=inductor")
    usual = fingerprint(compose())
    assert fingerprint(cfg) != usual == fingerprint(compose("batch_invariant=false"))


def test_a_run_within_another_run_has_its_switch_or_is_refused() -> None:
    with (
        switched(True),
        pytest.raises(ConfigError, match="another run in this process has another"),
    ):
        switched(True, batch_invariant=True).__enter__()
    assert Switches.running == 0


def test_the_record_says_it(quick_run: Callable[..., Any]) -> None:
    record = (quick_run("train.max_steps=1", "samples.rows=0").directory / "run.json").read_text()
    assert '"batch_invariant": false' in record
