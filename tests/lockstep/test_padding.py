"""Padding is left out of a pass where that changes no bit, and stays where it might."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from trl import SFTTrainer

from lora_exp.lockstep import eligibility
from lora_exp.lockstep.pack import MAX_TOKENS
from lora_exp.lockstep.padding import Kept
from lora_exp.lockstep.segment import Pass
from tests.conftest import in_fast_dtype
from tests.lockstep.runs import outputs, run_alone, run_packed
from tests.lockstep.test_segment import segments

MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])
JOBS = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8", "targets=qv", "seed=3"]]


def test_tokens_go_to_their_places_and_back() -> None:
    kept = Kept.of(MASK, MASK.shape)
    assert kept is not None
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    spread = kept.padded(x)
    assert spread[:, 0].tolist() == [0, 1, 2, 3, 0, 0]
    back = kept.unpadded(spread * 2)
    assert back.tolist() == [[2], [4], [6]]
    weights = torch.tensor([[1.0], [10.0], [100.0]])
    ((back * weights).sum() + 7 * spread.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2 + 7], [20 + 7], [200 + 7]]


def test_the_gradient_of_padding_is_zero() -> None:
    kept = Kept.of(MASK, MASK.shape)
    assert kept is not None
    y = torch.randn(6, 2, requires_grad=True)
    kept.unpadded(y).sum().backward()
    assert y.grad is not None
    assert y.grad[:, 0].tolist() == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "mask", [None, torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 5)],
    ids=["no mask", "no padding", "nothing else", "of a cache"],
)  # fmt: skip
def test_nothing_is_left_out(mask: Tensor | None) -> None:
    assert Kept.of(mask, torch.Size((2, 3))) is None


def test_nothing_is_left_out_with_a_cache() -> None:
    (s,) = segments((2, 3))
    s.arguments |= {"attention_mask": MASK, "past_key_values": DynamicCache()}
    s.leave_out_padding()
    assert s.kept is None


def test_rows_are_padded_again_in_a_jobs_own_shape() -> None:
    p = Pass(segments((2, 3), (1, 2)), 1, None)
    p.segments[0].arguments["attention_mask"] = MASK
    p.segments[0].leave_out_padding()
    assert p.sizes == [3, 2, 1]
    own = [torch.arange(6.0).view(2, 3, 1), torch.arange(2.0).view(1, 2, 1)]
    joined = p.joined(own)
    assert joined[0, :, 0].tolist() == [1, 2, 3, 0, 1, 0]
    assert p.own(0, joined)[..., 0].tolist() == [[0, 1, 2], [3, 0, 0]]
    flat = p.joined([x.view(-1, 1) for x in own])
    assert flat[:, 0].tolist() == [1, 2, 3, 0, 1, 0]
    assert p.own(0, flat).shape == (6, 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of which some are many times as long as others."""
    path, draw = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)
    texts = [" ".join(["red", "green", "sea"] * draw.choice([1, 2, 3, 20])) for _ in range(40)]
    lines = [json.dumps({"prompt": "Write:", "completion": f" {text}"}) for text in texts]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.gradient_checkpointing=true", "model.dtype=bfloat16"],
        [*in_fast_dtype("quant=nf4")],
        ["quant=int8"],
    ],
    ids="+".join,
)
def test_jobs_without_padding_equal_their_runs_alone(
    tmp_path: Path, rows: str, settings: list[str]
) -> None:
    common = ["data=jsonl", f"data.path={rows}", "data.eval_path=null", "data.max_eval_rows=8"]
    common += ["train.max_steps=3", *settings]
    results, pack = run_packed(JOBS, tmp_path / "pack", *common)
    for packed, alone in zip(results, run_alone(JOBS, tmp_path, *common), strict=True):
        assert outputs(packed) == outputs(alone)
    record = json.loads((results[0].directory / "run.json").read_text())["lockstep"]
    # 8-bit layers keep it in evaluations
    assert record["padding_left_out"] > (0.2 if "quant=int8" in settings else 0.3)
    assert pack.passes.counts["shared backward"] > 0


def test_a_pass_that_keeps_its_padding_is_not_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs' backwards are served together, although it has more tokens than were asked for."""
    lines = [json.dumps({"prompt": "Write:", "completion": " red" * n}) for n in (6, 14) * 8]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    common = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0"]
    monkeypatch.setitem(MAX_TOKENS, "cpu", 480)  # three batches, but not with their padding
    _, trained = run_packed([["seed=1"], ["seed=2"], ["seed=3"]], tmp_path / "pack", *common)
    assert trained.passes.counts["most jobs"] == 3
    assert trained.passes.counts["padding left out"] == 0
    assert trained.passes.counts["repeated"] == 0


def test_a_pass_of_one_job_leaves_out_its_padding_too(tmp_path: Path, rows: str) -> None:
    common = ["data=jsonl", f"data.path={rows}", "data.eval_path=null", "train.max_steps=2"]
    ((packed,), pack) = run_packed(JOBS[:1], tmp_path / "pack", *common)
    (alone,) = run_alone(JOBS[:1], tmp_path, *common)
    assert outputs(packed) == outputs(alone)
    assert pack.passes.counts["padding left out"] > 0


def test_an_unknown_trainer_keeps_padding(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics may read hidden states of padding."""
    common = ["data=jsonl", f"data.path={rows}", "data.eval_path=null", "train.max_steps=2"]
    monkeypatch.setattr(eligibility, "MASKING", {"DPOTrainer"})
    results, pack = run_packed(JOBS, tmp_path / "pack", *common)
    for packed, alone in zip(results, run_alone(JOBS, tmp_path, *common), strict=True):
        assert outputs(packed) == outputs(alone)
    assert pack.passes.counts["padding left out"] == 0


def test_a_loss_that_depends_on_padding_is_found(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SFTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        loss = own(self, model, inputs, *more, **options)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return loss + 1e-3 * model(**tokens).logits.mean()

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    common = ["data=jsonl", f"data.path={rows}", "data.eval_path=null", "train.max_steps=2"]
    results, pack = run_packed(JOBS, tmp_path, *common, "train.eval_strategy=no", verify=0)
    assert not any(isinstance(result, Exception) for result in results)
    assert any("depends on padding" in text for text in pack.passes.verification.differences)
