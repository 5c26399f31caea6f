"""The same jobs trained as one pack and alone, and everything that they computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from lora_exp import compose, run
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row
from tests.conftest import QUICK

COMMON = ["tracking=none", *QUICK, "train.max_steps=6", "train.logging_steps=1"]
COMMON += ["train.save_strategy=no", "samples.rows=2"]
# jobs that differ in nearly every setting
DIVERSE_JOBS = [
    ["peft.r=8"],
    ["peft.r=16", "targets=qv", "train.gradient_accumulation_steps=2", "peft.use_rslora=true"],
    ["peft.r=32", "peft.lora_dropout=0.1", "train.per_device_train_batch_size=2", "seed=7"],
    ["peft.r=4", "targets=mlp", "peft.lora_dropout=0.05", "train.per_device_train_batch_size=3",
     "train.learning_rate=1e-3", "train.lr_scheduler_type=linear", "train.max_steps=4",
     "train.weight_decay=0.1", "train.warmup_steps=2", "train.eval_strategy=steps",
     "train.eval_steps=2", "data.max_rows=40", "peft.lora_alpha=64", "seed=1"],
]  # fmt: skip


def run_packed(
    jobs: list[list[str]],
    folder: Path,
    *common: str,
    mode: str = "exact",
    max_jobs: int | None = 8,
    verify: float = 1,
    defaults: list[str] = COMMON,
    wrap: Callable[[int, Callable[[], Any]], Any] = lambda _, train: train(),
    bracket: Bracket | None = None,
) -> tuple[list[Any], Pack]:
    """Train jobs as one pack; a job's result is what it returned or raised."""
    pack = Pack(mode, max_jobs, verify)
    results: list[Any] = [None] * len(jobs)

    def job(n: int) -> None:
        seat = Seat(pack, n, Row(n, str(n)), n, bracket)
        try:
            cfg = compose(*defaults, *common, *jobs[n])
            results[n] = wrap(n, lambda: run(cfg, folder / str(n), place=seat))
        except Exception as error:
            results[n] = error

    pack.hub.run((lambda n=n: job(n)) for n in range(len(jobs)))  # type: ignore[misc]
    differences = pack.passes.verification.differences  # each names the first layer that differs
    assert not verify or differences == []
    return results, pack


def run_alone(
    jobs: list[list[str]], folder: Path, *common: str, defaults: list[str] = COMMON
) -> list[Any]:
    return [run(compose(*defaults, *common, *job), folder / str(n)) for n, job in enumerate(jobs)]


def outputs(result: Any) -> tuple[Any, ...]:
    """Return everything that a run computed: logged metrics, answers, losses by row and weights."""
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    logged = [
        {k: v for k, v in json.loads(line).items() if "per_s" not in k and "step_time" not in k}
        for line in lines
    ]
    metrics = {k: v for k, v in result.metrics.items() if k.startswith(("eval/", "before/"))}
    weights = (result.saved / "adapter_model.safetensors").read_bytes()
    names = ("samples.jsonl", "row_losses.json", "pairs.json")
    paths = [path for name in names if (path := result.directory / name).is_file()]
    return logged, metrics, {path.name: path.read_text() for path in paths}, weights


class AtThirdStep(TrainerCallback):  # type: ignore[misc]
    """Call a function with the model at the beginning of the third step."""

    def __init__(self, action: Callable[[Any], None]) -> None:
        self.action = action

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.action(model)


def text_rows(tokenizer: Any) -> Dataset:
    rows = [tokenizer(f"text number {i} " * (1 + i % 4)) for i in range(32)]
    return Dataset.from_list([dict(row) for row in rows])


class Collator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Plain next-token rows."""
