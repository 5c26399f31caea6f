"""A pass is held against the runs alone while it trains, and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_exp import compose, run
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.segment import Mode, Pass, Segment
from lora_exp.lockstep.state import PLAIN, RandomState
from lora_exp.lockstep.table import Row
from lora_exp.lockstep.verification import Verification, different
from tests.lockstep.processors import LINEAR, Halves, processor
from tests.lockstep.test_pack import COMMON, At, alone, packed, seen

MANY = 250  # rows; those of two jobs, and never those of one
# the same rows at each step: their classes are measured before the processor ages
SAME = ["data.max_rows=4", "samples.rows=0", "train.eval_strategy=no"]
MODE = Mode(PLAIN, True, False)


class BackwardHalves(torch.autograd.Function):
    """A product whose gradients alone are added in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return LINEAR(x, weight, bias)

    backward = Halves.backward


class Ageing:
    """A processor that from some moment on adds in another order, if there are many rows."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind, self.aged = kind, False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.aged and x.numel() // x.shape[-1] > MANY:
            return self.kind.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        return LINEAR(x, weight, bias)

    def age(self, _model: Any) -> None:
        self.aged = True


def trained(folder: Path, kind: type[torch.autograd.Function], verify: float) -> tuple[Any, Pack]:
    """Train two jobs on a processor that ages at their third step."""
    ageing, pack = Ageing(kind), Pack("exact", 2, verify)
    results: dict[int, Any] = {}

    def job(n: int) -> None:
        seat = Seat(pack, n, Row(n, str(n)))
        join = seat.join
        seat.join = lambda trainer: (trainer.add_callback(At(ageing.age)), join(trainer))  # type: ignore[assignment,func-returns-value,return-value]
        cfg = compose(*COMMON, f"peft.r={4 + n}", *SAME)
        results[n] = run(cfg, folder / str(n), place=seat)

    with processor(ageing):
        pack.hub.run((lambda n=n: job(n)) for n in range(2))  # type: ignore[misc]
    return results, pack


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Halves, "hidden values differ; the first layer is layers.0.self_attn.q_proj"),
     (BackwardHalves, "gradients of layers.3.")],
    ids=["forward", "backward"],
)  # fmt: skip
def test_a_pass_that_is_not_the_run_alone_is_seen_and_its_layer_named(
    tmp_path: Path, kind: type[torch.autograd.Function], told: str
) -> None:
    results, pack = trained(tmp_path, kind, verify=1)
    (difference,) = pack.verification.differences  # from then on the other is alone, too
    assert told in difference
    assert len(pack.verification.apart) == 1
    record = json.loads((results[1].directory / "run.json").read_text())
    assert record["lockstep"]["differences"] == [difference]
    assert 0 < record["lockstep"]["verified"] <= record["lockstep"]["passes"]


def test_without_verification_nobody_would_know(tmp_path: Path) -> None:
    results, pack = trained(tmp_path, Halves, verify=0)
    whole = [["peft.r=4"], ["peft.r=5"]]
    plain = alone(whole, tmp_path / "alone", *SAME)
    assert any(seen(results[n]) != seen(plain[n]) for n in range(2))
    assert pack.report()["verified"] == 0


def test_every_pass_can_be_verified_with_caches_dropout_and_checkpointing(tmp_path: Path) -> None:
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8", "seed=1"]]
    again = "train.gradient_checkpointing=true"
    results, pack = packed(jobs, tmp_path / "pack", again)
    assert pack.verification.verified == pack.verification.passes > 20
    for ours, theirs in zip(results, alone(jobs, tmp_path, again), strict=True):
        assert seen(ours) == seen(theirs)  # a verified pass draws nothing from anybody's stream


def passes(sizes: list[list[int]], share: float) -> list[int | None]:
    """Return which segment of each pass is verified."""
    verification = Verification(share, {})
    random, chosen = RandomState.now(), []
    for each in sizes:
        ids = [torch.zeros(1, n, dtype=torch.long) for n in each]
        segments = [Segment(i, x, None, None, None, random) for i, x in enumerate(ids)]
        check = verification.choose(MODE, Pass(segments, 0, None))
        chosen.append(check.place if check else None)
    return chosen


def test_numbers_of_rows_are_verified_when_they_are_new_and_then_a_share() -> None:
    assert passes([[8, 8]] * 4, 0.01) == [0, None, None, None]
    assert passes([[8, 9], [8, 9], [9, 8], [8, 8]], 0.01) == [0, 1, None, 0]
    assert sum(place is not None for place in passes([[8, 8]] * 1000, 0.01)) == 11
    assert passes([[8, 9]] * 3, 0) == [None, None, None]
    assert passes([[8, 8]] * 4, 1) == [0, 0, 1, 0]


def test_a_difference_is_one_of_bits() -> None:
    one = torch.tensor([1.0, 0.0, float("nan"), 3.0])
    other = torch.tensor([1.0, -0.0, float("nan"), 3.0000002])
    assert different(one, one.clone()) == 0
    assert different(one, other) == 1
    assert different(None, one) == 4
    assert different(one.bfloat16(), other.bfloat16()) == 0
