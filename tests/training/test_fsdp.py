"""Full fine-tuning whose two processes share the weights out: its bytes, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_exp.training.manifest import seal
from tests.model.test_sharded import RUN
from tests.parallel.test_launch import killed_stopped_and_resumed
from tests.test_experiment import digest
from tests.training.test_checkpoint import owner_of
from tests.warm import python


def weights_of(run: Path) -> str:
    return digest(run / "model")["model.safetensors"]


WHOLE = [*RUN, "peft=none", "parallel.processes=2", "train.max_grad_norm=0"]
WHOLE += ["algorithm.args.packing=true", "algorithm.args.max_length=512"]  # 1,024 tokens a process


def test_full_fine_tuning_is_resumed_and_has_the_bits_of_copies(tmp_path: Path) -> None:
    copies = [*WHOLE, "parallel=ddp", "hydra.run.dir=copies"]
    done = python("-m", "tests.parallel.forked", *copies, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = killed_stopped_and_resumed(tmp_path, *WHOLE, "parallel=fsdp")
    assert "rows of a step, and has a share of the weights and the optimizer's state" in printed
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "copies")
    ours, theirs = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("run", "copies"))
    for name in ("before/loss", "eval/loss", "train/loss"):
        assert ours["metrics"][name] == theirs["metrics"][name]
    names = ("optimizer.pt", "optimizer-1.pt")
    last = tmp_path / "run/checkpoints/checkpoint-12"
    states = [torch.load(last / name, weights_only=True)["state"] for name in names]
    sizes = [sum(one["exp_avg"].numel() for one in state.values()) for state in states]
    assert sum(sizes) == ours["counts"]["trainable_parameters"]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sum(sizes)
    tensors = load_file(last / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, last / "model.safetensors", {"format": "pt"})
    seal(last, owner_of(tmp_path / "run"), 12)
    command = ["resume=run", "train.max_steps=16"]
    refused = python("-m", "tests.parallel.forked", *command, cwd=tmp_path)
    assert refused.returncode == 1
    assert "does not hold model.layers.1.mlp.up_proj.weight; start a new run" in refused.stderr


def evaluations(folder: Path) -> dict[int, float]:
    """Return a run's losses on held-out rows, by step; of step 0 that before training."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


def test_several_passes_in_bfloat16_and_clipped_are_near_those_of_copies_and_the_best_is_saved(
    tmp_path: Path,
) -> None:
    options = ["peft=none", "algorithm=dpo", "data=demo_pairs", "train.max_steps=4", "keep=best"]
    options += ["data.rows=64", "data.eval_rows=8", "train.eval_strategy=steps"]
    options += ["train.eval_steps=1"]
    # so high that the last step is hardly the best; which is, depends on rounding
    options += ["train.learning_rate=0.05", "train.warmup_steps=0", "parallel.processes=2"]
    base = [o for o in RUN if not o.startswith(("data.", "train.max", "train.save", "train.eval"))]
    for kind in ("ddp", "fsdp"):
        command = [*base, *options, f"parallel={kind}", f"hydra.run.dir={kind}"]
        command += ["train.gradient_accumulation_steps=4", "train.bf16=true"]
        done = python("-m", "tests.parallel.forked", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    ours, theirs = (evaluations(tmp_path / name) for name in ("fsdp", "ddp"))
    assert ours[0] == pytest.approx(theirs[0], rel=0.01)
    assert ours[1] == pytest.approx(theirs[1], rel=0.05)
    record = json.loads((tmp_path / "fsdp/run.json").read_text())
    assert record["saved_step"] == min(range(1, 5), key=ours.__getitem__)
    assert record["metrics"]["eval/loss"] == ours[record["saved_step"]]
    saved, kept = (
        load_file(tmp_path / "fsdp" / folder / "model.safetensors")
        for folder in ("model", record["best"]["checkpoint"])
    )
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
