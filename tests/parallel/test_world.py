"""A process alone, and two that meet: what they share, gather and agree on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from lora_exp.parallel.world import World
from tests.conftest import ROOT
from tests.warm import Process

MEET = """
import json, sys, torch
from pathlib import Path
from accelerate.state import PartialState
from lora_exp.parallel.world import world
from lora_exp.training.guards import check_alike
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
world.join(rank, 2, folder / "meeting", rank)
with world.first_alone():
    seen = (folder / "stored").is_file()
    (folder / "stored").touch()
weight = torch.nn.Parameter(torch.ones(2))
unreached, frozen = torch.nn.Parameter(torch.ones(1)), torch.ones(1)
if rank == 0:
    weight.grad = torch.tensor([2.0, 4.0])
world.average_gradients([weight, unreached, frozen])
state = PartialState(cpu=True)
with world.apart():
    apart = PartialState().num_processes
try:
    check_alike([torch.nn.Parameter(torch.full((2,), float(rank)))], 7)
    alike = None
except Exception as error:
    alike = str(error)
check_alike([weight], 8)
print(json.dumps({
    "seen": seen, "shared": world.shared(f"of {rank}"), "gathered": world.gathered(rank),
    "any": [world.any(rank == 1), world.any(False)], "mean": world.mean(rank),
    "pooled": world.pooled({"a": [rank]} | ({"b": [5]} if rank else {})),
    "own": world.own("rollout.pt"), "total": world.total(torch.tensor(3)).item(),
    "grad": weight.grad.tolist(), "unreached": unreached.grad is None,
    "apart": [state.num_processes, apart, PartialState().num_processes], "alike": alike,
}))
world.leave()
"""


def test_two_processes_share_gather_and_agree(tmp_path: Path) -> None:
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    pair = [
        Process("-c", MEET, str(rank), str(tmp_path), env=env | {n: str(rank) for n in RANKS})
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert (first.pop("seen"), second.pop("seen")) == (False, True)
    assert (first.pop("own"), second.pop("own")) == ("rollout.pt", "rollout-1.pt")
    assert "different weights at step 7" in first["alike"]
    assert first == second
    assert first | {"alike": None} == {
        "shared": "of 0", "gathered": [0, 1], "any": [True, False], "mean": 0.5, "total": 6,
        "pooled": {"a": [0, 1], "b": [5]}, "grad": [1.0, 2.0], "unreached": True,
        "apart": [2, 1, 2], "alike": None,
    }  # fmt: skip


RANKS = ("RANK", "LOCAL_RANK")


def test_a_process_alone_has_only_its_own() -> None:
    world = World()
    assert world.is_first
    assert (world.shared(3), world.gathered(3), world.any(True), world.mean(3)) == (3, [3], True, 3)
    assert world.pooled({"a": [1.0]}) == {"a": [1.0]}
    assert world.own("ppo.json") == "ppo.json"
    weight = torch.nn.Parameter(torch.ones(1))
    world.average_gradients([weight])
    assert weight.grad is None
    before = dict(PartialState._shared_state)
    with world.apart(), world.first_alone():
        assert dict(PartialState._shared_state) == before


def test_a_failure_apart_restores_the_state() -> None:
    world = World()
    world.size = 2
    PartialState(cpu=True)
    before = dict(PartialState._shared_state)
    with pytest.raises(ZeroDivisionError), world.apart():
        raise ZeroDivisionError
    assert dict(PartialState._shared_state) == before
