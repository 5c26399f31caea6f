"""What must hold on a GPU: equal bytes, packs, resume, merges, the demos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.bench import Bench, Case, Failed, Shape

RANDOM_BASE = str(Path(__file__).with_name("random_base.py"))
SHORT = ["train.max_steps=6", "samples.rows=0", "train.eval_strategy=no", "train.logging_steps=1"]
SHORT += ["train.save_strategy=no", "train.learning_rate=1e-3", "data.max_rows=64"]
SHORT += ["data.max_eval_rows=8"]
JOBS = ["peft.r=4,16", "train.per_device_train_batch_size=2,3", "peft.lora_dropout=0.1"]


def bases(bench: Bench) -> Iterator[Case]:
    """Make each base."""
    for name, shape in bench.bases.items():

        def make(name: str = name, shape: Shape = shape) -> str:
            folder = bench.scratch / name
            bench.command(RANDOM_BASE, str(folder), json.dumps(shape))
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            return f"{size / 2**30:.2f} GiB"

        yield f"{name} {shape.saved_as}", make


def machine(bench: Bench) -> Iterator[Case]:
    """Say what is measured."""
    yield (
        "doctor",
        lambda: "; ".join(
            f"{check['what']}: {check['details']}"
            for check in json.loads(bench.command("-m", "lora_exp.cli", "doctor", "--json"))
            if any(
                word in check["what"].lower() for word in ("device", "gpu", "torch", "bitsandbytes")
            )
        ),
    )


def checks(bench: Bench) -> Iterator[Case]:
    """Equal runs, packs beside runs alone, resume, a merge and the demos."""

    def again() -> str:
        for name in ("equal-1", "equal-2"):
            bench.sweep(name, *bench.base("small"), *SHORT, *JOBS, alone=True)
        return bench.compared("equal-1", "equal-2")

    def packed(name: str, *setting: str) -> Case:
        def measure() -> str:
            jobs = JOBS if bench.on_gpu else JOBS[::2]
            words = [*bench.base("small"), *SHORT, *jobs, *setting]
            bench.sweep(f"{name}-alone", *words, alone=True)
            found = bench.sweep(f"{name}-pack", *words)
            shared = found[0]["lockstep"]
            text = bench.compared(f"{name}-alone", f"{name}-pack")
            apart = f"; apart: {shared['why_apart']}" if shared["why_apart"] else ""
            passes = f"{shared['shared_passes']} of {shared['passes']} passes shared"
            together = f"{shared['products_together'] or 0:.0%} of products together"
            return f"{text}; {passes}, {together}, proven: {shared['proven']}{apart}"

        return f"pack against alone, {name}", measure

    yield "equal runs, bf16", again
    yield packed("bf16")
    yield packed("nf4", "quant=nf4")
    yield packed("int8", "quant=int8")
    yield packed("checkpointing", "train.gradient_checkpointing=true")
    yield "resume, then merge, bf16", lambda: f"{_resumed(bench)}; merge {_merged(bench)}"
    yield "demos of the algorithms, 3 steps", lambda: _demos(bench)


def _resumed(bench: Bench) -> str:
    steady = ["train.lr_scheduler_type=constant", "train.warmup_steps=0", "peft.lora_dropout=0.1"]
    words = [*bench.base("small"), *SHORT, *steady, "train.save_strategy=steps", "tracking=none"]
    for name, steps in {"whole": 6, "cut": 3}.items():
        limits = [f"train.max_steps={steps}", "train.save_steps=3"]
        bench.command("run.py", *words, *limits, f"hydra.run.dir={bench.scratch / name}")
    bench.command("run.py", f"resume={bench.scratch / 'cut'}", "train.max_steps=6")
    return bench.compared("whole", "cut")


def _merged(bench: Bench) -> str:
    run, out = bench.scratch / "whole", bench.scratch / "merged"
    bench.command("-m", "lora_exp.cli", "merge", str(run), "--out", str(out))
    words = ["check", str(out), "--adapter", str(run), "--max-new-tokens", "4", "--json"]
    proof = json.loads(bench.command("-m", "lora_exp.cli", *words))
    return f"holds; largest difference of a logit {proof['max_difference']:.2g}"


def _demos(bench: Bench) -> str:
    names = ("dpo", "kto", "reward", "grpo", "rloo", "ppo")
    steps = ["train.max_steps=3", "samples.rows=0", "data.rows=64", "data.eval_rows=8"]
    with suppress(Failed):  # the records have the errors
        bench.sweep("demos", "experiment=" + ",".join(f"demo_{n}" for n in names), *steps)
    found = []
    for number, name in enumerate(names):
        path = bench.scratch / "demos" / str(number) / "run.json"
        record = json.loads(path.read_text()) if path.is_file() else {"status": "did not begin"}
        error = f" ({record['error'][:80]})" if record.get("error") else ""
        found.append(f"{name} {record['status']}{error}")
    bad = any("finished" not in text for text in found)
    return ("**not all**: " if bad else "") + ", ".join(found)


def tests(bench: Bench) -> Iterator[Case]:
    """Run the tests that need a GPU."""
    if bench.on_gpu and bench.level == "full":
        words = ["-m", "pytest", "-q", "tests/gpu"]
        yield "tests/gpu", lambda: bench.command(*words).strip().splitlines()[-1]
