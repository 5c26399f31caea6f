"""The contract: a job of a pack equals its run alone, bit for bit, whatever the others do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from lora_exp import compose, run
from lora_exp.errors import DivergedError
from lora_exp.files.paths import asset
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row
from lora_exp.model.loading import Base, sharing_copy
from lora_exp.training.place import Alone
from tests.conftest import QUICK, ROOT, tiny

COMMON = ["tracking=none", *QUICK, "train.max_steps=6", "train.logging_steps=1"]
COMMON += ["train.save_strategy=no", "train.per_device_train_batch_size=4", "samples.rows=2"]
# jobs that differ in nearly everything that a run can differ in
UNLIKE = [
    ["peft.r=8"],
    ["peft.r=16", "targets=qv", "train.gradient_accumulation_steps=2", "peft.use_rslora=true"],
    ["peft.r=32", "peft.lora_dropout=0.1", "train.per_device_train_batch_size=2", "seed=7"],
    ["peft.r=4", "targets=mlp", "peft.lora_dropout=0.05", "train.per_device_train_batch_size=3",
     "train.learning_rate=1e-3", "train.lr_scheduler_type=linear", "train.max_steps=4",
     "train.weight_decay=0.1", "train.warmup_steps=2", "train.eval_strategy=steps",
     "train.eval_steps=2", "data.max_rows=40", "peft.lora_alpha=64", "seed=1"],
]  # fmt: skip


def packed(
    jobs: list[list[str]],
    folder: Path,
    *common: str,
    mode: str = "exact",
    max_jobs: int | None = 8,
    verify: float = 1,
    every: list[str] = COMMON,
    around: Callable[[int, Callable[[], Any]], Any] = lambda _, go: go(),
) -> tuple[list[Any], Pack]:
    """Train jobs as one pack; a job's result is what it returned or raised."""
    pack = Pack(mode, max_jobs, verify)
    results: list[Any] = [None] * len(jobs)

    def job(n: int) -> None:
        seat = Seat(pack, n, Row(n, str(n)))
        try:
            cfg = compose(*every, *common, *jobs[n])
            results[n] = around(n, lambda: run(cfg, folder / str(n), place=seat))
        except Exception as error:
            results[n] = error

    pack.hub.run((lambda n=n: job(n)) for n in range(len(jobs)))  # type: ignore[misc]
    differences = pack.passes.verification.differences  # which name the first layer
    assert not verify or differences == []
    return results, pack


def alone(
    jobs: list[list[str]], folder: Path, *common: str, every: list[str] = COMMON
) -> list[Any]:
    return [run(compose(*every, *common, *job), folder / str(n)) for n, job in enumerate(jobs)]


def computed(result: Any) -> tuple[Any, ...]:
    """Return all that a run computed: every logged number, every answer, every weight."""
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    logged = [
        {k: v for k, v in json.loads(line).items() if "per_s" not in k and "step_time" not in k}
        for line in lines
    ]
    metrics = {k: v for k, v in result.metrics.items() if k.startswith(("eval/", "before/"))}
    weights = (result.saved / "adapter_model.safetensors").read_bytes()
    return logged, metrics, (result.directory / "samples.jsonl").read_text(), weights


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_four_unlike_jobs_equal_four_runs_alone(tmp_path: Path, quant: str) -> None:
    results, pack = packed(UNLIKE, tmp_path / "pack", f"quant={quant}")
    for ours, theirs in zip(results, alone(UNLIKE, tmp_path, f"quant={quant}"), strict=True):
        assert computed(ours) == computed(theirs)
    assert pack.passes.counts["most jobs"] == 4  # they did share


@pytest.mark.parametrize(
    "setting",
    [
        ["train.gradient_checkpointing=true"],
        ["train.gradient_checkpointing=true", "quant=nf4"],
        ["model.dtype=bfloat16"],
        ["algorithm=pretrain"],
        ["algorithm.args.packing=true", "algorithm.args.max_length=128"],
        ["train.per_device_train_batch_size=1", "data.max_rows=8"],
    ],
    ids=lambda setting: "+".join(setting),
)
def test_jobs_equal_their_runs_alone_under_every_setting(
    tmp_path: Path, setting: list[str]
) -> None:
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8", "targets=attention"]]
    results, pack = packed(jobs, tmp_path / "pack", *setting)
    for ours, theirs in zip(results, alone(jobs, tmp_path, *setting), strict=True):
        assert computed(ours) == computed(theirs)
    assert pack.passes.counts["most jobs"] == 2


ARGUMENTS = [
    ["+train.adam_epsilon=1e-4", "+train.adam_beta1=0.8", "+train.data_seed=3"],
    ["+algorithm.args.loss_type=dft", "+algorithm.args.pad_to_multiple_of=8",
     "+train.train_sampling_strategy=group_by_length"],
    ["train.optim=adafactor", "train.lr_scheduler_type=cosine_with_restarts",
     "+train.lr_scheduler_kwargs={num_cycles: 2}", "+train.eval_on_start=true",
     "+train.logging_first_step=true", "train.dataloader_num_workers=1"],
    ["+train.dataloader_drop_last=true", "train.per_device_eval_batch_size=4",
     "+algorithm.args.shuffle_dataset=true",
     "+train.eval_accumulation_steps=1", "+train.include_num_input_tokens_seen=all"],
    ["keep=best", "train.eval_strategy=steps", "train.eval_steps=2", "train.save_strategy=steps",
     "train.save_steps=2", "train.learning_rate=5e-2"],
    ["+algorithm.args.activation_offloading=true"],
]  # fmt: skip


def test_arguments_of_the_trainer_act_in_a_pack_as_they_do_alone(tmp_path: Path) -> None:
    results, _ = packed(ARGUMENTS, tmp_path / "pack")
    for ours, theirs in zip(results, alone(ARGUMENTS, tmp_path), strict=True):
        assert computed(ours) == computed(theirs)


def test_a_hook_on_a_jobs_own_module_acts_in_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hooking(join: Any) -> Any:
        def joined(self: Any, *about: Any) -> None:
            join(self, *about)
            if about[-1].args.seed == 7:
                layer = about[-1].model.get_base_model().model.layers[0].mlp
                layer.register_forward_hook(lambda module, given, output: output * 1.5)

        return joined

    jobs = [["peft.r=4"], ["peft.r=8", "seed=7"]]
    plain, _ = packed(jobs, tmp_path / "plain")
    for kind in (Pack, Alone):
        monkeypatch.setattr(kind, "join", hooking(kind.join))
    results, _ = packed(jobs, tmp_path / "pack")
    theirs = alone(jobs, tmp_path)
    weights = [[computed(result)[-1] for result in of] for of in (results, theirs, plain)]
    assert weights[0] == weights[1]
    assert weights[0][0] == weights[2][0]
    assert weights[0][1] != weights[2][1]


def test_stacked_adapters_are_near_and_the_record_names_the_mode(tmp_path: Path) -> None:
    jobs = [["peft.r=2", "peft.lora_dropout=0.1"], ["peft.r=16", "targets=qv"], ["peft.r=8"]]
    results, _ = packed(jobs, tmp_path / "pack", mode="bmm")
    for ours, theirs in zip(results, alone(jobs, tmp_path), strict=True):
        one, two = (load_file(r.saved / "adapter_model.safetensors") for r in (ours, theirs))
        assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-4
        assert ours.metrics["eval/loss"] == pytest.approx(theirs.metrics["eval/loss"], abs=1e-4)
        assert '"lockstep, bmm"' in (ours.directory / "run.json").read_text()


def test_slots_are_filled_again_and_results_stay_the_same(tmp_path: Path) -> None:
    jobs = [[f"peft.r={r}", f"train.max_steps={s}"] for r, s in ((2, 3), (4, 6), (8, 2), (16, 4))]
    results, pack = packed(jobs, tmp_path / "pack", max_jobs=2)
    assert pack.passes.counts["most jobs"] == 2
    for ours, theirs in zip(results, alone(jobs, tmp_path), strict=True):
        assert computed(ours) == computed(theirs)


def test_memory_decides_how_many_train_at_once(tmp_path: Path) -> None:
    _, pack = packed([["peft.r=2"], ["peft.r=4"]], tmp_path, max_jobs=None)
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


class At(TrainerCallback):  # type: ignore[misc]
    """Do something at the third step."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.act(model)


def poisoned(model: Any) -> None:
    """Set an adapter's weights to NaN."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, float("nan"))


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_job_that_fails_between_forward_and_backward_takes_none_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    join = Pack.join

    def joined(self: Pack, job: int, trainer: Any) -> None:
        join(self, job, trainer)
        if job == 1:
            trainer.accelerator.backward = broken

    monkeypatch.setattr(Pack, "join", joined)
    jobs = [[*job, f"train.gradient_checkpointing={checkpointing}"] for job in UNLIKE[:2]]
    results, _ = packed(jobs, tmp_path / "pack")
    assert isinstance(results[1], RuntimeError)
    assert computed(results[0]) == computed(alone(jobs[:1], tmp_path)[0])


@pytest.mark.parametrize(
    ("act", "error"), [(poisoned, DivergedError), (broken, RuntimeError)], ids=["NaN", "exception"]
)
def test_a_failed_job_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any, error: type[Exception]
) -> None:
    join = Pack.join

    def joined(self: Pack, job: int, trainer: Any) -> None:
        if job == 1:
            trainer.add_callback(At(act))
        join(self, job, trainer)

    monkeypatch.setattr(Pack, "join", joined)
    jobs = [UNLIKE[0], ["peft.r=4"], UNLIKE[2]]
    results, _ = packed(jobs, tmp_path / "pack")
    assert isinstance(results[1], error)
    record = json.loads((tmp_path / "pack" / "1" / "run.json").read_text())
    assert record["status"] == ("diverged" if error is DivergedError else "failed")
    for n in (0, 2):
        assert computed(results[n]) == computed(alone([jobs[n]], tmp_path / str(n))[0])


def test_a_request_that_fails_is_the_failure_of_its_own_job_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Pack.join

    def joined(self: Pack, job: int, trainer: Any) -> None:
        if job == 0:
            collate = trainer.data_collator

            def wrong(rows: Any) -> Any:
                batch = collate(rows)
                batch["input_ids"][0, 0] = 10**6  # a token that no embedding has
                return batch

            trainer.data_collator = wrong
        join(self, job, trainer)

    monkeypatch.setattr(Pack, "join", joined)
    results, _ = packed([["peft.r=2"], UNLIKE[2]], tmp_path / "pack")
    assert isinstance(results[0], IndexError)
    assert computed(results[1]) == computed(alone([UNLIKE[2]], tmp_path)[0])


def test_a_job_resumes_from_its_checkpoint_within_a_pack(tmp_path: Path) -> None:
    save = ["train.save_strategy=steps", "train.save_steps=3", "train.save_total_limit=2"]
    jobs = [["peft.r=4", "peft.lora_dropout=0.1"], ["peft.r=8"]]
    whole = alone(jobs, tmp_path / "alone", *save)
    results, _ = packed(jobs, tmp_path / "pack", *save)
    first = results[0].directory
    for path in sorted((first / "checkpoints" / "checkpoint-6").iterdir()):
        path.unlink()
    (first / "checkpoints" / "checkpoint-6").rmdir()
    record = json.loads((first / "run.json").read_text()) | {"status": "failed"}
    (first / "run.json").write_text(json.dumps(record))
    pack = Pack("exact", 2, verify=1)
    gone_on: list[Any] = []
    others: list[Any] = []

    def resumed() -> None:
        seat = Seat(pack, 0, Row(0, ""))
        gone_on.append(run(compose(f"resume={first}"), place=seat))

    def beside() -> None:
        cfg = compose(*COMMON, *save, *jobs[1])
        others.append(run(cfg, tmp_path / "beside", place=Seat(pack, 1, Row(1, ""))))

    pack.hub.run([resumed, beside])
    weights = "adapter_model.safetensors"
    for ours, theirs in ((gone_on[0], whole[0]), (others[0], whole[1])):
        assert (ours.saved / weights).read_bytes() == (theirs.saved / weights).read_bytes()


def preference(tokenizer: Any) -> Dataset:
    words = ["mirror", "letters", "small", "adapter", "big", "heart", "lora", "name", "call"]
    rows = [
        {
            "prompt": f"say {words[i % 9]}",
            "chosen": " " + " ".join(words[i % 5 : i % 5 + 4]),
            "rejected": " " + words[i % 7],
        }
        for i in range(32)
    ]
    return Dataset.from_list(rows)


def texts(tokenizer: Any) -> Dataset:
    rows = [tokenizer(f"text number {i} " * (1 + i % 4)) for i in range(32)]
    return Dataset.from_list([dict(row) for row in rows])


class Collator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Plain next-token rows."""


TRAINERS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "dpo": (DPOTrainer, DPOConfig, preference, {"max_length": 64}),
    "reward": (RewardTrainer, RewardConfig, preference, {"max_length": 64}),
    "transformers": (Trainer, TrainingArguments, texts, {}),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["none", "nf4"])
@pytest.mark.parametrize("trainer_name", ["dpo", "reward", "transformers"])
def test_other_trainers_keep_the_contract_unmodified(
    tmp_path: Path, trainer_name: str, quantized: bool
) -> None:
    from lora_exp.model.loading import bnb_4bit

    quant = bnb_4bit("nf4", True, "float32") if quantized else None
    base = tiny(quant)
    if trainer_name == "reward":
        if quantized:
            pytest.skip("the score head of a quantised base comes with algorithm=reward")
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(asset(base.path), num_labels=1)
        model.config.pad_token_id = base.tokenizer.pad_token_id
        base = Base(model.requires_grad_(False), base.tokenizer, base.path, None, None)
    trainer_class, args_class, rows, extra = TRAINERS[trainer_name]
    jobs = [(4, 0.1, 4, 1, 42), (8, 0.0, 2, 2, 1), (16, 0.05, 3, 1, 7)]

    def trained(n: int, pack: Pack | None) -> tuple[Any, dict[str, Any]]:
        r, dropout, batch, accumulation, seed = jobs[n]
        torch.manual_seed(seed)
        task = "SEQ_CLS" if trainer_name == "reward" else "CAUSAL_LM"
        targets = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(
            r=r, lora_dropout=dropout, target_modules=targets, task_type=task
        )  # fmt: skip
        args = args_class(
            str(tmp_path / f"{n}{pack is None}"), per_device_train_batch_size=batch, max_steps=4,
            gradient_accumulation_steps=accumulation, logging_steps=1, report_to=[], seed=seed,
            save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-3,
            gradient_checkpointing=False, **extra,
        )  # fmt: skip
        collator = {"data_collator": Collator(base.tokenizer, mlm=False)}
        trainer = trainer_class(
            model=peft.get_peft_model(sharing_copy(base.model), config), args=args,
            train_dataset=rows(base.tokenizer), processing_class=base.tokenizer,
            **(collator if trainer_name == "transformers" else {}),
        )  # fmt: skip
        if pack is not None:
            pack.join(n, trainer)
        trainer.train()
        numbers = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
        assert len(numbers) == 4
        return numbers, peft.get_peft_model_state_dict(trainer.model)

    solo = [trained(n, None) for n in range(3)]
    pack = Pack("exact", 3, 1, base)
    results: dict[int, Any] = {}
    pack.hub.run((lambda n=n: results.update({n: trained(n, pack)})) for n in range(3))  # type: ignore[misc]
    assert pack.passes.counts["most jobs"] == 3
    assert pack.passes.verification.differences == []
    for n, (numbers, weights) in enumerate(solo):
        assert results[n][0] == numbers
        assert all(torch.equal(results[n][1][k], w) for k, w in weights.items())


class Twice(Trainer):  # type: ignore[misc]
    """Two forwards before each backward."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        compute = super().compute_loss
        first = compute(model, dict(inputs), *rest, **options)
        return first + 0.5 * compute(model, dict(inputs), *rest, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_is_repeated_for_a_job_whose_backward_is_later(
    tmp_path: Path, base: Base, checkpointing: bool
) -> None:
    def trained(n: int, trainer_class: type[Trainer], pack: Pack | None) -> tuple[Any, Any]:
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
            train_dataset=texts(base.tokenizer), processing_class=base.tokenizer,
            data_collator=Collator(base.tokenizer, mlm=False),
        )  # fmt: skip
        if pack is not None:
            pack.join(n, trainer)
        trainer.train()
        return trainer.state.log_history[0]["loss"], peft.get_peft_model_state_dict(trainer.model)

    trainers = (Trainer, Twice)
    solo = [trained(n, trainer_class, None) for n, trainer_class in enumerate(trainers)]
    pack = Pack("exact", 2, 1, base)
    pack.hub.width = 2  # both from the start, so that they share their first pass
    results: dict[int, Any] = {}
    pack.hub.run(
        (
            lambda n=n, trainer_class=trainer_class: results.update(
                {n: trained(n, trainer_class, pack)}
            )
        )  # type: ignore[misc]
        for n, trainer_class in enumerate(trainers)
    )
    assert pack.passes.counts["most jobs"] == 2
    assert pack.passes.verification.differences == []
    for n, (loss, weights) in enumerate(solo):
        assert results[n][0] == loss
        assert all(torch.equal(results[n][1][k], w) for k, w in weights.items())


def test_a_base_that_cannot_be_fused_is_shared_all_the_same(tmp_path: Path) -> None:
    jobs = [["peft.r=2"], ["peft.r=4", "peft.lora_dropout=0.1"]]
    eager = "model.attn_implementation=eager"
    results, pack = packed(jobs, tmp_path / "pack", eager)
    assert pack.passes.counts["most jobs"] == 0
    for ours, theirs in zip(results, alone(jobs, tmp_path, eager), strict=True):
        assert computed(ours) == computed(theirs)


MEMORY = """
import resource, sys, warnings
from pathlib import Path
from lora_exp.lockstep.hub import Hub
from lora_exp.lockstep.passes import Passes
from tests.lockstep.test_pack import alone, computed, packed

folder, jobs = Path(sys.argv[1]), [[f"seed={n}", "peft.lora_dropout=0.1"] for n in range(4)]
large = ["train.per_device_train_batch_size=8", "train.max_steps=3", "samples.rows=0",
         "train.eval_strategy=no"]
whole = alone(jobs, folder / "alone", *large)
forward = Passes._forward

def tightened(self, requests, context):
    if context.training and len(requests) > 2 and not hasattr(self, "tight"):
        self.tight = True
        status = Path("/proc/self/status").read_text()
        held = int(status.split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]) * 2**20, -1))
    answers = forward(self, requests, context)
    if self.hub.max_batch:  # memory has run out; lift the limit
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return answers

def remember_hub(self, *arguments):
    init(self, *arguments)
    Passes.hub = self

init, Hub.__init__ = Hub.__init__, remember_hub
Passes._forward = tightened
results, pack = packed(jobs, folder / "pack", *large)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
for ours, theirs in zip(results, whole):
    if isinstance(ours, Exception):
        raise ours
    assert computed(ours) == computed(theirs)
print("shared by", pack.hub.max_batch, "most", pack.passes.counts["most jobs"])
"""


def test_too_little_memory_makes_passes_smaller_and_changes_nothing(tmp_path: Path) -> None:
    """The limit is the system's own: allocations fail in whatever line they happen."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for room in (60, 30, 90):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(room)), str(room)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and "shared by None" not in done.stdout:
            break
    assert done.returncode == 0, done.stderr
    assert re.search(r"shared by [123] ", done.stdout)
