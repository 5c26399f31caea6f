"""A pack's mechanics: how many jobs it trains at once, their failures, resumption and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from lora_exp import compose, run
from lora_exp.errors import DivergedError
from lora_exp.lockstep import pack as pack_file
from lora_exp.lockstep import proof
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row
from lora_exp.model.loading import Base
from lora_exp.model.sharing import sharing_copy
from tests.conftest import ROOT
from tests.lockstep.runs import (
    COMMON,
    DIVERSE_JOBS,
    AtThirdStep,
    Collator,
    outputs,
    run_alone,
    run_packed,
    text_rows,
)


def test_a_free_slot_goes_to_the_next_job_and_results_stay_the_same(tmp_path: Path) -> None:
    jobs = [[f"peft.r={r}", f"train.max_steps={s}"] for r, s in ((2, 3), (4, 6), (8, 2), (16, 4))]
    results, pack = run_packed(jobs, tmp_path / "pack", max_jobs=2)
    assert pack.passes.counts["most jobs"] == 2
    for packed, alone in zip(results, run_alone(jobs, tmp_path), strict=True):
        assert outputs(packed) == outputs(alone)


def test_memory_decides_how_many_train_at_once(tmp_path: Path) -> None:
    _, pack = run_packed([["peft.r=2"], ["peft.r=4"]], tmp_path, max_jobs=None)
    assert pack.hub.width > 2


def test_the_largest_job_so_far_decides_how_many_fit() -> None:
    pack = Pack("exact", None, verify=1)
    pack.free_bytes, pack.job_bytes = 1000, {0: 100}
    pack.widen()
    assert pack.hub.width == 7  # and one for verification
    pack.job_bytes[1] = 200
    pack.widen()
    assert pack.hub.width == 3
    pack.loss_bytes = 200  # of which there is one, whatever the number of jobs
    pack.widen()
    assert pack.hub.width == 2


def set_nan(model: Any) -> None:
    """Set an adapter's weights to NaN."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("nan"))


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_job_that_fails_between_forward_and_backward_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    join = Pack.join

    def join_and_break(self: Pack, job: int, trainer: Any) -> None:
        join(self, job, trainer)
        if job == 1:
            trainer.accelerator.backward = fail

    monkeypatch.setattr(Pack, "join", join_and_break)
    jobs = [[*job, f"train.gradient_checkpointing={checkpointing}"] for job in DIVERSE_JOBS[:2]]
    results, _ = run_packed(jobs, tmp_path / "pack")
    assert isinstance(results[1], RuntimeError)
    assert outputs(results[0]) == outputs(run_alone(jobs[:1], tmp_path)[0])


@pytest.mark.parametrize(
    ("action", "error"), [(set_nan, DivergedError), (fail, RuntimeError)], ids=["NaN", "exception"]
)
def test_a_failed_job_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Any, error: type[Exception]
) -> None:
    join = Pack.join

    def add_callback_and_join(self: Pack, job: int, trainer: Any) -> None:
        if job == 1:
            trainer.add_callback(AtThirdStep(action))
        join(self, job, trainer)

    monkeypatch.setattr(Pack, "join", add_callback_and_join)
    jobs = [DIVERSE_JOBS[0], ["peft.r=4"], DIVERSE_JOBS[2]]
    results, _ = run_packed(jobs, tmp_path / "pack")
    assert isinstance(results[1], error)
    record = json.loads((tmp_path / "pack" / "1" / "run.json").read_text())
    assert record["status"] == ("diverged" if error is DivergedError else "failed")
    for n in (0, 2):
        assert outputs(results[n]) == outputs(run_alone([jobs[n]], tmp_path / str(n))[0])


def test_a_failed_request_fails_only_its_own_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Pack.join

    def break_and_join(self: Pack, job: int, trainer: Any) -> None:
        if job == 0:
            collate = trainer.data_collator

            def collate_wrongly(rows: Any) -> Any:
                batch = collate(rows)
                batch["input_ids"][0, 0] = 10**6  # a token that no embedding has
                return batch

            trainer.data_collator = collate_wrongly
        join(self, job, trainer)

    monkeypatch.setattr(Pack, "join", break_and_join)
    results, _ = run_packed([["peft.r=2"], DIVERSE_JOBS[2]], tmp_path / "pack")
    assert isinstance(results[0], IndexError)
    assert outputs(results[1]) == outputs(run_alone([DIVERSE_JOBS[2]], tmp_path)[0])


def test_a_job_resumes_from_its_checkpoint_within_a_pack(tmp_path: Path) -> None:
    save = ["train.save_strategy=steps", "train.save_steps=3", "train.save_total_limit=2"]
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8"]]
    alone = run_alone(jobs, tmp_path / "alone", *save)
    results, _ = run_packed(jobs, tmp_path / "pack", *save)
    first = results[0].directory
    for path in sorted((first / "checkpoints" / "checkpoint-6").iterdir()):
        path.unlink()
    (first / "checkpoints" / "checkpoint-6").rmdir()
    record = json.loads((first / "run.json").read_text()) | {"status": "failed"}
    (first / "run.json").write_text(json.dumps(record))
    pack = Pack("exact", 2, verify=1)
    resumed: list[Any] = []
    others: list[Any] = []

    def resume() -> None:
        seat = Seat(pack, 0, Row(0, ""))
        resumed.append(run(compose(f"resume={first}"), place=seat))

    def run_beside() -> None:
        cfg = compose(*COMMON, *save, *jobs[1])
        others.append(run(cfg, tmp_path / "beside", place=Seat(pack, 1, Row(1, ""))))

    pack.hub.run([resume, run_beside])
    weights = "adapter_model.safetensors"
    for packed, expected in ((resumed[0], alone[0]), (others[0], alone[1])):
        assert (packed.saved / weights).read_bytes() == (expected.saved / weights).read_bytes()


class TwoForwards(Trainer):  # type: ignore[misc]
    """Two forwards before each backward."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        compute = super().compute_loss
        first = compute(model, dict(inputs), *rest, **options)
        return first + 0.5 * compute(model, dict(inputs), *rest, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_is_repeated_for_a_job_whose_backward_is_later(
    tmp_path: Path, base: Base, checkpointing: bool
) -> None:
    def train(n: int, trainer_class: type[Trainer], pack: Pack | None) -> tuple[Any, Any]:
        torch.manual_seed(n)
        config = peft.LoraConfig(r=4 + n, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
        args = TrainingArguments(
            str(tmp_path / f"{n}{pack is None}"), per_device_train_batch_size=4, max_steps=3,
            gradient_accumulation_steps=2, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer = trainer_class(
            model=peft.get_peft_model(sharing_copy(base.model), config), args=args,
            train_dataset=text_rows(base.tokenizer), processing_class=base.tokenizer,
            data_collator=Collator(base.tokenizer, mlm=False),
        )  # fmt: skip
        if pack is not None:
            pack.join(n, trainer)
        trainer.train()
        return trainer.state.log_history[0]["loss"], peft.get_peft_model_state_dict(trainer.model)

    trainers = (Trainer, TwoForwards)
    alone = [train(n, trainer_class, None) for n, trainer_class in enumerate(trainers)]
    pack = Pack("exact", 2, 1, base)
    pack.hub.width = 2  # both from the start, so that they share their first pass
    results: dict[int, Any] = {}
    pack.hub.run(
        (
            lambda n=n, trainer_class=trainer_class: results.update(
                {n: train(n, trainer_class, pack)}
            )
        )  # type: ignore[misc]
        for n, trainer_class in enumerate(trainers)
    )
    assert pack.passes.counts["most jobs"] == 2
    assert pack.passes.verification.differences == []
    for n, (loss, weights) in enumerate(alone):
        assert results[n][0] == loss
        assert all(torch.equal(results[n][1][name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("training_only", [True, False])
def test_a_base_whose_proof_fails_is_still_shared_and_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_only: bool
) -> None:
    prove = proof.difference

    def break_proof(fused: Any) -> str | None:
        if training_only and not fused.context.training:
            return prove(fused)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(proof, "difference", break_proof)
    jobs = [["peft.r=2"], ["peft.r=4", "peft.lora_dropout=0.1"]]
    results, pack = run_packed(jobs, tmp_path / "pack")
    assert pack.passes.counts["shared backward"] == 0
    assert (pack.passes.counts["shared forward"] > 0) == training_only
    for packed, alone in zip(results, run_alone(jobs, tmp_path), strict=True):
        assert outputs(packed) == outputs(alone)
    record = json.loads((results[0].directory / "run.json").read_text())["lockstep"]
    reason = "RuntimeError: broken on purpose"
    assert record["why_apart"] == (f"in training: {reason}" if training_only else reason)


def test_batches_that_fill_a_pass_are_computed_apart_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [["peft.r=2"], ["peft.r=4"]]
    monkeypatch.setattr(pack_file, "MAX_TOKENS", {"cpu": 20})
    results, pack = run_packed(jobs, tmp_path / "pack")
    assert pack.passes.counts["shared backward"] == 0  # answers are shared, a token at a time
    for packed, alone in zip(results, run_alone(jobs, tmp_path), strict=True):
        assert outputs(packed) == outputs(alone)
        record = json.loads((packed.directory / "run.json").read_text())["lockstep"]
        expected = r"^in training: its batches have \d+ tokens or more, and a pass at most 20"
        assert re.search(expected, record["why_apart"]), record


MEMORY = """
import resource, sys, warnings
from pathlib import Path
from lora_exp.lockstep.hub import Hub
from lora_exp.lockstep.passes import Passes
from tests.lockstep.runs import outputs, run_alone, run_packed

folder, jobs = Path(sys.argv[1]), [[f"seed={n}", "peft.lora_dropout=0.1"] for n in range(4)]
large = ["train.per_device_train_batch_size=8", "train.max_steps=3", "samples.rows=0",
         "train.eval_strategy=no"]
alone = run_alone(jobs, folder / "alone", *large)
forward = Passes._forward

def limit_memory(self, requests, context):
    if context.training and len(requests) > 2 and not hasattr(self, "limited"):
        self.limited = True
        status = Path("/proc/self/status").read_text()
        used = int(status.split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20, -1))
    answers = forward(self, requests, context)
    if self.hub.max_batch:  # memory has run out; lift the limit
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return answers

def remember_hub(self, *arguments):
    init(self, *arguments)
    Passes.hub = self

init, Hub.__init__ = Hub.__init__, remember_hub
Passes._forward = limit_memory
results, pack = run_packed(jobs, folder / "pack", *large)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
for packed, expected in zip(results, alone):
    if isinstance(packed, Exception):
        raise packed
    assert outputs(packed) == outputs(expected)
print("shared by", pack.hub.max_batch, "most", pack.passes.counts["most jobs"])
"""


def test_too_little_memory_makes_passes_smaller_and_changes_nothing(tmp_path: Path) -> None:
    """The operating system sets the limit, so an allocation may fail in any line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for margin in (60, 30, 90):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(margin)), str(margin)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and "shared by None" not in done.stdout:
            break
    assert done.returncode == 0, done.stderr
    assert re.search(r"shared by [123] ", done.stdout)
