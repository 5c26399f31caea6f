"""Full fine-tuning whose two processes share the weights out: its bytes, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.model.test_sharded import RUN
from tests.parallel.test_launch import killed_stopped_and_resumed
from tests.test_experiment import digest
from tests.warm import python


def weights_of(run: Path) -> str:
    return digest(run / "model")["model.safetensors"]


WHOLE = [*RUN, "peft=none", "parallel.processes=2", "train.max_grad_norm=0"]


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


def test_the_best_weights_of_all_processes_are_saved(tmp_path: Path) -> None:
    options = ["peft=none", "algorithm=dpo", "data=demo_pairs", "train.max_steps=4", "keep=best"]
    options += ["train.eval_strategy=steps", "train.eval_steps=1"]
    options += ["train.learning_rate=0.05", "train.warmup_steps=0", "parallel.processes=2"]
    base = [o for o in RUN if not o.startswith(("data.", "train.max", "train.save", "train.eval"))]
    for kind in ("ddp", "fsdp"):
        command = [*base, *options, f"parallel={kind}", "train.max_grad_norm=0"]
        command += [f"hydra.run.dir={kind}"]
        done = python("-m", "tests.parallel.forked", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "fsdp/run.json").read_text())
    assert record["saved_step"] < 4
    assert weights_of(tmp_path / "fsdp") == weights_of(tmp_path / "ddp")
