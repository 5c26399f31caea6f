"""Runs whose two processes share out the optimizer's state: their bytes, and what they save."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MixtralConfig

from lora_exp import compose
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.training.zero import Zero
from tests.parallel.test_launch import RUN, killed_stopped_and_resumed
from tests.test_experiment import digest
from tests.warm import python

TWO = ["parallel=zero2", "parallel.processes=2"]
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")


def trained(folder: Path, *overrides: str) -> Path:
    """Train in two processes, and return the run's directory."""
    done = python("-m", "tests.parallel.forked", *RUN, *overrides, "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [x for x in done.stderr.splitlines() if "find_unused_parameters" not in x] == []
    return folder / "run"


def largest_difference(one: Path, two: Path) -> float:
    first, second = load_file(one), load_file(two)
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {
        n: (t.shape, t.dtype) for n, t in second.items()
    }
    return max((first[name] - second[name]).abs().max().item() for name in first)


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes, without interruption."""
    return trained(tmp_path_factory.mktemp("zero2"), *TWO)


@needs_deepspeed
def test_it_trains_what_copies_of_the_optimizer_do(whole: Path, tmp_path: Path) -> None:
    copies = trained(tmp_path, "parallel=ddp", TWO[1])
    adapter = Path("adapter/adapter_model.safetensors")
    # the factor of clipping is rounded in another way, which 12 steps of Adam magnify
    assert largest_difference(whole / adapter, copies / adapter) < 2e-4
    unclipped = ["train.max_grad_norm=0", "train.max_steps=6", "train.save_strategy=no"]
    runs = []
    for number, kind in enumerate(("parallel=zero2", "parallel=ddp")):
        (tmp_path / str(number)).mkdir()
        runs.append(trained(tmp_path / str(number), kind, TWO[1], *unclipped))
    assert largest_difference(*(run / adapter for run in runs)) == 0
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (whole, copies))
    assert ours["metrics"]["before/loss"] == theirs["metrics"]["before/loss"]
    assert ours["metrics"]["eval/loss"] == pytest.approx(theirs["metrics"]["eval/loss"], rel=1e-6)
    norms = [
        [row["train/grad_norm"] for row in logged(run) if "train/grad_norm" in row]
        for run in (whole, copies)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    shares = [
        torch.load(whole / "checkpoints/checkpoint-12" / name, weights_only=True)
        for name in ("optimizer.pt", "optimizer-1.pt")
    ]
    sizes = [sum(tensor.numel() for tensor in share["weights"]) for share in shares]
    assert sum(sizes) == ours["counts"]["trainable_parameters"]
    assert sizes[0] == sizes[1]


@needs_deepspeed
@pytest.mark.parametrize("method", ["lora", "none"])
def test_killed_and_stopped_it_resumes_bit_for_bit(
    whole: Path, tmp_path: Path, method: str
) -> None:
    folder, saved = tmp_path / "run", "model" if method == "none" else "adapter"
    if method == "none":
        (tmp_path / "whole").mkdir()
        whole = trained(tmp_path / "whole", *TWO, "peft=none")
    killed_stopped_and_resumed(tmp_path, *RUN, *TWO, f"peft={method}")
    assert digest(folder / saved) == digest(whole / saved)


@needs_deepspeed
def test_full_fine_tuning_in_bfloat16_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    options = ["peft=none", "train.bf16=true", "train.max_steps=2", "train.save_strategy=no"]
    shared = trained(tmp_path, *TWO, *options) / "model/model.safetensors"
    copies = trained(tmp_path / "copies", "parallel=ddp", TWO[1], *options)
    assert largest_difference(shared, copies / "model/model.safetensors") < 1e-3
    assert {tensor.dtype for tensor in load_file(shared).values()} == {torch.float32}


@needs_deepspeed
def test_copies_are_not_resumed_as_shares(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel"):
        compose(f"resume={whole}", "parallel=ddp")


def of(trainer: Any, **attributes: Any) -> Any:
    made = type("Trainer", (Zero, trainer), {})()
    vars(made).update(attributes)
    return made


def test_a_run_that_would_have_copies_instead_stops() -> None:
    state, args = SimpleNamespace(distributed_type="MULTI_CPU"), SimpleNamespace(fp16=False)
    model = SimpleNamespace(config=LlamaConfig())
    trainer = of(object, accelerator=SimpleNamespace(state=state), args=args, model=model)
    with pytest.raises(LoraExpError, match="zero2 asked for DeepSpeed, but it is MULTI_CPU"):
        trainer.use_autocast()


@pytest.mark.parametrize(
    ("fp16", "config", "message"),
    [(True, LlamaConfig, "float16 needs a scaled loss"), (False, MixtralConfig, "of experts")],
)
def test_what_only_the_loaded_base_shows_is_refused(fp16: bool, config: Any, message: str) -> None:
    args, model = SimpleNamespace(fp16=fp16), SimpleNamespace(config=config())
    with pytest.raises(ConfigError, match=message):
        of(object, args=args, model=model).use_autocast()


def test_a_norm_that_is_not_finite_is_not_masked() -> None:
    class Base:
        def _get_grad_norm(self, model: Any, grad_norm: float) -> float:
            return grad_norm

    assert math.isnan(of(Base)._get_grad_norm(None, -1.0))
    assert of(Base)._get_grad_norm(None, 2.0) == 2.0
