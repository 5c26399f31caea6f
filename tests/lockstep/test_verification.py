"""Passes are compared with runs alone during training, and a difference is located."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_exp import compose, run
from lora_exp.lockstep import verification
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.segment import Pass, PassContext, Segment
from lora_exp.lockstep.state import PLAIN, RandomState
from lora_exp.lockstep.table import Row
from lora_exp.lockstep.verification import Verification, count_differences
from tests.lockstep.processors import LINEAR, Strided, processor
from tests.lockstep.test_pack import COMMON, At, alone, computed, packed

MANY = 250  # rows; those of two jobs, and never those of one
# the same rows at each step: their classes are measured before the processor ages
SAME = ["data.max_rows=4", "samples.rows=0", "train.eval_strategy=no"]
CONTEXT = PassContext(PLAIN, True, False)


class BackwardStrided(torch.autograd.Function):
    """A product whose gradients alone are added in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return LINEAR(x, weight, bias)

    backward = Strided.backward


class Ageing:
    """A processor that from some moment on adds in another order, if there are many rows."""

    def __init__(self, product: type[torch.autograd.Function]) -> None:
        self.product, self.aged = product, False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.aged and x.numel() // x.shape[-1] > MANY:
            return self.product.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        return LINEAR(x, weight, bias)

    def age(self, _model: Any) -> None:
        self.aged = True


def trained(
    folder: Path, product: type[torch.autograd.Function], verify: float
) -> tuple[Any, Pack]:
    """Train two jobs on a processor that ages at their third step."""
    ageing, pack = Ageing(product), Pack("exact", 2, verify)
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


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))  # of another processor


@pytest.mark.parametrize(
    ("product", "message"),
    [(Strided, "the first layer is layers.0.self_attn.q_proj"),
     (BackwardStrided, "gradients of layers.3.")],
    ids=["forward", "backward"],
)  # fmt: skip
def test_a_pass_that_differs_from_the_run_alone_is_detected_and_its_layer_named(
    tmp_path: Path, product: type[torch.autograd.Function], message: str
) -> None:
    results, pack = trained(tmp_path, product, verify=1)
    differences = pack.passes.verification.differences
    assert message in " ".join(differences)
    assert len(pack.passes.verification.excluded) == 1
    record = json.loads((results[1].directory / "run.json").read_text())
    assert record["lockstep"]["differences"] == differences
    assert record["lockstep"]["proven"] is False
    assert 0 < record["lockstep"]["verified"] <= record["lockstep"]["passes"]


def test_without_verification_a_difference_is_not_detected(tmp_path: Path) -> None:
    results, pack = trained(tmp_path, Strided, verify=0)
    whole = [["peft.r=4"], ["peft.r=5"]]
    plain = alone(whole, tmp_path / "alone", *SAME)
    assert any(computed(results[n]) != computed(plain[n]) for n in range(2))
    assert pack.passes.report()["verified"] == 0


def test_every_pass_can_be_verified_with_caches_dropout_and_checkpointing(tmp_path: Path) -> None:
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8", "seed=1"]]
    again = "train.gradient_checkpointing=true"
    results, pack = packed(jobs, tmp_path / "pack", again)
    assert pack.passes.verification.verified == pack.passes.verification.passes > 20
    for ours, theirs in zip(results, alone(jobs, tmp_path, again), strict=True):
        assert computed(ours) == computed(
            theirs
        )  # a verified pass draws nothing from anybody's stream


def passes(sizes: list[list[int]], fraction: float) -> list[int | None]:
    """Return which segment of each pass is verified."""
    chooser = Verification(fraction, {})
    random, indices = RandomState.now(), []
    for each in sizes:
        ids = [torch.zeros(1, n, dtype=torch.long) for n in each]
        segments = [Segment(i, x, None, None, None, random) for i, x in enumerate(ids)]
        check = chooser.choose(CONTEXT, Pass(segments, 0, None))
        if check is not None:  # and verified without a difference
            chooser._verified_keys |= check.keys
            chooser._tokens[1] += segments[check.index].tokens
        indices.append(check.index if check else None)
    return indices


def test_a_first_pass_is_verified_and_new_products_within_a_budget() -> None:
    assert passes([[8, 8]] * 4, 1e-9) == [0, None, None, None]
    assert passes([[8, 8]] * 110 + [[8, 9]] * 2, 1e-9)[110:] == [1, None]
    always_new = passes([[8 + i, 8 + i, 8 + i, 8 + i] for i in range(1000)], 1e-9)
    assert 30 < sum(index is not None for index in always_new) < 45  # 1% of the tokens, by fourths


def test_a_share_of_all_passes_is_verified_and_jobs_take_turns() -> None:
    indices = [index for index in passes([[8] * 4] * 5000, 0.01) if index is not None]
    assert 30 < len(indices) < 75
    assert set(indices) == {0, 1, 2, 3}
    assert None not in passes([[8, 9]] * 30, 1)
    assert passes([[8, 9]] * 3, 0) == [None, None, None]


def test_after_a_difference_classes_are_measured_anew(tmp_path: Path) -> None:
    trained(tmp_path, Strided, verify=0)
    assert len(list((tmp_path / "cache").glob("classes/*.json"))) == 1
    trained(tmp_path / "again", Strided, verify=1)
    assert not list((tmp_path / "cache").glob("classes/*.json"))


def test_a_difference_is_recorded_before_its_layer_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> str:
        raise MemoryError("too little memory to look")

    monkeypatch.setattr(verification, "_first_layer", short)
    _, pack = trained(tmp_path, Strided, verify=1)
    assert "hidden values differ" in pack.passes.verification.differences[0]
    assert "too little memory to look" in pack.passes.verification.differences[1]
    assert pack.hub.max_batch is None  # no pass was made smaller for it


def test_a_difference_is_one_of_bits() -> None:
    nan = float("nan")
    one, other = torch.tensor([1.0, 0.0, nan, 3.0]), torch.tensor([1.0, -0.0, -nan, 3.0000002])
    assert count_differences(one, one.clone()) == 0
    assert count_differences(one, other) == 1
    assert count_differences(None, one) == 4
    assert count_differences(one.bfloat16(), other.bfloat16()) == 0
