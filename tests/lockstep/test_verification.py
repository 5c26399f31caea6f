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
from tests.lockstep.processors import LINEAR, StridedProduct, simulated_processor
from tests.lockstep.runs import COMMON, AtThirdStep, outputs, run_alone, run_packed

ROW_LIMIT = 250  # two jobs together have more rows, one alone never has
# the same rows at each step: their classes are measured before the processor changes
SAME_ROWS = ["data.max_rows=4", "samples.rows=0", "train.eval_strategy=no"]
CONTEXT = PassContext(PLAIN, True, False)


class BackwardStrided(torch.autograd.Function):
    """A product that sums only its gradients in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return LINEAR(x, weight, bias)

    backward = StridedProduct.backward


class ChangingProcessor:
    """A processor that, once changed, sums passes of many rows in another order."""

    def __init__(self, product: type[torch.autograd.Function]) -> None:
        self.product, self.changed = product, False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.changed and x.numel() // x.shape[-1] > ROW_LIMIT:
            return self.product.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        return LINEAR(x, weight, bias)

    def change(self, _model: Any) -> None:
        self.changed = True


def train_two(
    folder: Path, product: type[torch.autograd.Function], verify: float
) -> tuple[Any, Pack]:
    """Train two jobs on a processor that changes at their third step."""
    changing, pack = ChangingProcessor(product), Pack("exact", 2, verify)
    results: dict[int, Any] = {}

    def job(n: int) -> None:
        seat = Seat(pack, n, Row(n, str(n)))
        join = seat.join
        seat.join = lambda trainer: (
            trainer.add_callback(AtThirdStep(changing.change)),
            join(trainer),
        )  # type: ignore[assignment,func-returns-value,return-value]
        cfg = compose(*COMMON, f"peft.r={4 + n}", *SAME_ROWS)
        results[n] = run(cfg, folder / str(n), place=seat)

    with simulated_processor(changing):
        pack.hub.run((lambda n=n: job(n)) for n in range(2))  # type: ignore[misc]
    return results, pack


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))  # apart from this processor's


@pytest.mark.parametrize(
    ("product", "message"),
    [(StridedProduct, "the first layer is layers.0.self_attn.q_proj"),
     (BackwardStrided, "gradients of layers.3.")],
    ids=["forward", "backward"],
)  # fmt: skip
def test_a_pass_that_differs_from_the_run_alone_is_detected_and_its_layer_named(
    tmp_path: Path, product: type[torch.autograd.Function], message: str
) -> None:
    results, pack = train_two(tmp_path, product, verify=1)
    differences = pack.passes.verification.differences
    assert message in " ".join(differences)
    assert len(pack.passes.verification.excluded) == 1
    record = json.loads((results[1].directory / "run.json").read_text())
    assert record["lockstep"]["differences"] == differences
    assert record["lockstep"]["proven"] is False
    assert 0 < record["lockstep"]["verified"] <= record["lockstep"]["passes"]


def test_without_verification_a_difference_is_not_detected(tmp_path: Path) -> None:
    results, pack = train_two(tmp_path, StridedProduct, verify=0)
    jobs = [["peft.r=4"], ["peft.r=5"]]
    alone = run_alone(jobs, tmp_path / "alone", *SAME_ROWS)
    assert any(outputs(results[n]) != outputs(alone[n]) for n in range(2))
    assert pack.passes.report()["verified"] == 0
    assert pack.passes.report()["proven"] is None  # nothing was verified


def test_every_pass_can_be_verified_with_caches_dropout_and_checkpointing(tmp_path: Path) -> None:
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8", "seed=1"]]
    checkpointing = "train.gradient_checkpointing=true"
    results, pack = run_packed(jobs, tmp_path / "pack", checkpointing)
    assert pack.passes.verification.verified == pack.passes.verification.passes > 20
    for packed, alone in zip(results, run_alone(jobs, tmp_path, checkpointing), strict=True):
        # verification draws no random numbers from a job's generator
        assert outputs(packed) == outputs(alone)


def verified_segments(sizes: list[list[int]], fraction: float) -> list[int | None]:
    """Return the index of the segment that is verified in each pass, or None."""
    chooser = Verification(fraction, {})
    random, indices = RandomState.now(), []
    for pass_sizes in sizes:
        ids = [torch.zeros(1, n, dtype=torch.long) for n in pass_sizes]
        segments = [Segment(i, {"input_ids": x}, random) for i, x in enumerate(ids)]
        check = chooser.choose(CONTEXT, Pass(segments, 0, None))
        if check is not None:  # as if verified without a difference
            chooser._verified_keys |= check.keys
            chooser._tokens[1] += segments[check.index].tokens
        indices.append(check.index if check else None)
    return indices


def test_a_first_pass_is_verified_and_new_products_within_a_budget() -> None:
    assert verified_segments([[8, 8]] * 4, 1e-9) == [0, None, None, None]
    assert verified_segments([[8, 8]] * 110 + [[8, 9]] * 2, 1e-9)[110:] == [1, None]
    always_new = verified_segments([[8 + i, 8 + i, 8 + i, 8 + i] for i in range(1000)], 1e-9)
    assert 30 < sum(index is not None for index in always_new) < 45  # 1% of the tokens


def test_a_share_of_all_passes_is_verified_and_jobs_take_turns() -> None:
    indices = [index for index in verified_segments([[8] * 4] * 5000, 0.01) if index is not None]
    assert 30 < len(indices) < 75
    assert set(indices) == {0, 1, 2, 3}
    assert None not in verified_segments([[8, 9]] * 30, 1)
    assert verified_segments([[8, 9]] * 3, 0) == [None, None, None]


def test_after_a_difference_classes_are_measured_anew(tmp_path: Path) -> None:
    train_two(tmp_path, StridedProduct, verify=0)
    assert len(list((tmp_path / "cache").glob("classes/*.json"))) == 1
    train_two(tmp_path / "again", StridedProduct, verify=1)
    assert not list((tmp_path / "cache").glob("classes/*.json"))


def test_a_difference_is_recorded_before_its_layer_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*_: Any) -> str:
        raise MemoryError("too little memory to look")

    monkeypatch.setattr(verification, "_first_layer", run_out_of_memory)
    _, pack = train_two(tmp_path, StridedProduct, verify=1)
    assert "hidden values differ" in pack.passes.verification.differences[0]
    assert "too little memory to look" in pack.passes.verification.differences[1]
    assert pack.hub.max_batch is None  # no pass was made smaller because of it


def test_differences_are_counted_by_bits() -> None:
    nan = float("nan")
    values, changed = torch.tensor([1.0, 0.0, nan, 3.0]), torch.tensor([1.0, -0.0, -nan, 3.0000002])
    assert count_differences(values, values.clone()) == 0
    assert count_differences(values, changed) == 1
    assert count_differences(None, values) == 4
    assert count_differences(values.bfloat16(), changed.bfloat16()) == 0
