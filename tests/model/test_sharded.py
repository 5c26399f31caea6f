"""Layers that are shared out among two processes: what each keeps, and whole runs over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lora_exp import compose, load_adapter
from lora_exp.errors import ConfigError
from lora_exp.model.sharded import share_layers, share_weights
from tests.conftest import ROOT
from tests.parallel.test_launch import RUN as LAUNCHED
from tests.parallel.test_launch import killed_stopped_and_resumed
from tests.test_experiment import digest
from tests.warm import Process, python

SHARE = """
import json, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from lora_exp.model.sharded import share_layers
from lora_exp.parallel.world import world
from tests.conftest import tiny
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
world.join(rank, 2, folder / "meeting", rank)
torch.manual_seed(0)
options = {"target_modules": "all-linear", "init_lora_weights": False}
model = get_peft_model(tiny().model, LoraConfig(**options))
ids = torch.arange(12)[None] + rank
numbers = sum(p.numel() for p in model.parameters())
def passed():
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits, [p.grad for p in model.parameters() if p.grad is not None]
whole = passed()
share_layers(model)
shared = passed()
parts = [p for p in model.parameters() if isinstance(p, DTensor)]
print(json.dumps({
    "alike": torch.equal(whole[0], shared[0]) and all(map(torch.equal, whole[1], shared[1])),
    "gradients": len(shared[1]), "all": sum(p.numel() for p in model.parameters()) == numbers,
    "kept": sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts),
    "parts": sorted({n.split(".layers.")[0] for n, p in model.named_parameters()
                     if isinstance(p, DTensor)}),
    "trained": [n for n, p in model.named_parameters() if p.requires_grad and p in set(parts)],
    "answers": model.generate(
        input_ids=ids, min_new_tokens=3 + rank, max_new_tokens=3 + rank).shape[1],
}))
world.leave()
"""


def test_each_process_keeps_its_part_and_computes_the_same_bits(tmp_path: Path) -> None:
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    pair = [Process("-c", SHARE, str(rank), str(tmp_path), env=env) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    # in step, although one has a token more to generate
    assert (first.pop("answers"), second.pop("answers")) == (15, 16)
    assert first == second
    assert first["gradients"] > 0
    assert first | {"gradients": 0} == {
        "alike": True, "gradients": 0, "all": True, "kept": 0.5,
        "parts": ["base_model.model.model"], "trained": [],
    }  # fmt: skip


def adapted(base: Any) -> Any:
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))


def test_a_base_that_names_no_layers_is_refused(fresh_base: Any) -> None:
    model = adapted(fresh_base.model)
    fresh_base.model._no_split_modules = None
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not say which modules are its"):
        share_layers(model)


def with_a_number(model: Any) -> None:
    model.model.layers[0].scale = torch.nn.Parameter(torch.tensor(1.0))


def with_a_weight_twice(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def with_a_weight_outside(model: Any) -> None:
    model.model.layers[0].embedding = model.model.embed_tokens


def with_two_dtypes(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().bfloat16())


def with_layerdrop(model: Any) -> None:
    model.config.layerdrop = 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_number, "has a weight that is one number"),
        (with_a_weight_twice, "two layers of LlamaForCausalLM share a weight"),
        (with_a_weight_outside, "is in a layer and elsewhere"),
        (with_two_dtypes, "of one dtype, and these are bfloat16 and float32; give float32"),
        (with_layerdrop, "leaves layers out at random"),
    ],
)
def test_weights_that_torch_cannot_share_out_are_refused(
    fresh_base: Any, change: Callable[[Any], None], message: str
) -> None:
    change(fresh_base.model)
    with pytest.raises(ConfigError, match=message):
        share_weights(fresh_base.model)


# of three batches to evaluate the second process counts one, and makes another with the first
RUN = [o for o in LAUNCHED if "eval_batch" not in o] + ["train.per_device_eval_batch_size=6"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes with a copy of the base each."""
    folder = tmp_path_factory.mktemp("ddp")
    options = [*RUN, "parallel=ddp", "parallel.processes=2", "hydra.run.dir=run"]
    done = python("-m", "tests.parallel.forked", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_killed_stopped_and_resumed_it_has_the_bits_of_copies(copies: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [*RUN, "parallel=fsdp", "parallel.processes=2"]
    printed = killed_stopped_and_resumed(tmp_path, *options)
    assert "rows of a step, and has a share of the frozen layers" in printed
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert [digest(folder / "adapter")[name] for name in names] == [
        digest(copies / "adapter")[name] for name in names
    ]
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (folder, copies))
    for name in ("before/loss", "eval/loss", "eval/mean_token_accuracy", "train/loss"):
        assert ours["metrics"][name] == theirs["metrics"][name]
    assert (folder / "samples.jsonl").read_text() == (copies / "samples.jsonl").read_text()
    model, _ = load_adapter(folder / "adapter")  # a plain one
    assert not any("DTensor" in type(p.data).__name__ for p in model.parameters())


def test_with_another_kind_of_sharing_it_is_refused_on_resume(copies: Path) -> None:
    with pytest.raises(ConfigError, match="parallel"):
        compose(f"resume={copies}", "parallel=fsdp")
