"""Makespan, where a step's time goes, memory, and the price of kernels with equal bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.bench import Bench, Case, Failed

PROFILED = str(Path(__file__).with_name("profiled_steps.py"))
# base, tokens of a job's step, jobs
QUICK_GRID = [("0.6B", 128, 8), ("0.6B", 2048, 8), ("8B", 128, 8)]
FULL_GRID = [
    (b, t, n) for t in (128, 512, 2048) for b in ("0.6B", "8B", "1.7B") for n in (4, 8, 16)
]


def _rows(bench: Bench, base: str, tokens: int) -> list[str]:
    """Return the overrides of short runs on rows of a length, a row a step."""
    rows = bench.scratch / f"{tokens}.jsonl"
    if not rows.is_file():
        rows.write_text((json.dumps({"text": "lora " * tokens}) + "\n") * 64)
    return [
        *bench.base(base), "algorithm=pretrain", "data=jsonl", f"data.path={rows}",
        "data.eval_share=0", f"algorithm.args.max_length={tokens}", "samples.rows=0",
        "train.per_device_train_batch_size=1", "train.logging_steps=1", "train.save_strategy=no",
        "train.learning_rate=2e-4",
    ]  # fmt: skip


def speed(bench: Bench) -> Iterator[Case]:
    """Makespan: a pack's jobs beside one job alone, times their number."""
    grid = {"quick": QUICK_GRID, "full": FULL_GRID}[bench.level]
    if not bench.on_gpu:
        grid = [("8B", 16, 2)]
    steps = "train.max_steps=20" if bench.on_gpu else "train.max_steps=3"
    for base, tokens, jobs in grid:

        def measure(base: str = base, tokens: int = tokens, jobs: int = jobs) -> str:
            alone, name = f"speed-{base}-{tokens}", f"speed-{base}-{tokens}-{jobs}"
            words = [*_rows(bench, base, tokens), steps]
            if not (bench.scratch / alone).is_dir():
                bench.sweep(alone, *words, "seed=0", alone=True)
            record = json.loads((bench.scratch / alone / "0" / "run.json").read_text())
            seconds = record["metrics"]["train/seconds"]
            seeds = "seed=" + ",".join(map(str, range(jobs)))
            found = bench.sweep(name, *words, seeds, f"lockstep.max_jobs={jobs}")
            # those of a pack's job are its share, so they add up to the pack's
            together = sum(r["metrics"]["train/seconds"] for r in found)
            equal = bench.weights(alone)[0] == bench.weights(name)[0]
            text = f"one by one {seconds * jobs:.1f} s, pack {together:.1f} s"
            ratio = seconds * jobs / together
            return f"{text}: **{ratio:.2f}x**; first adapter equal: {equal}"

        yield f"{base}, {tokens} tokens, {jobs} jobs", measure


def profiles(bench: Bench) -> Iterator[Case]:
    """Where a step's time goes, alone and in a pack."""
    for base, tokens, jobs in [("0.6B", 128, 1), ("8B", 128, 1), ("0.6B", 128, 8)]:
        if not bench.on_gpu:
            base, tokens, jobs = "8B", 16, min(jobs, 2)

        def measure(base: str = base, tokens: int = tokens, jobs: int = jobs) -> str:
            folder = bench.scratch / f"profile-{base}-{jobs}"
            words = [*_rows(bench, base, tokens), "tracking=none"]
            output = bench.command(PROFILED, str(folder), str(jobs), *words)
            p = json.loads(output.splitlines()[-1])
            busy = f"{p['step'] * 1e3:.0f} ms a step, device busy {p['busy']:.0%}"
            launching = f"{p['launches']:.0f} launches take {p['launching']:.0%}"
            waiting = f"{p['syncs']:.0f} syncs, {p['waiting']:.0%} ({', '.join(p['places'])})"
            return f"{busy}, {launching}, dequantising {p['dequantising']:.0%}, {waiting}"

        yield f"{base}, {tokens} tokens, {jobs} jobs", measure
        if not bench.on_gpu and jobs > 1:
            return


def determinism(bench: Bench) -> Iterator[Case]:
    """What deterministic kernels cost."""
    base, tokens = ("0.6B", 2048) if bench.on_gpu else ("small", 16)

    def measure() -> str:
        speeds = []
        for value in ("true", "false"):
            words = [*_rows(bench, base, tokens), "train.max_steps=20", f"deterministic={value}"]
            (record,) = bench.sweep(f"deterministic-{value}", *words, "seed=0", alone=True)
            speeds.append(record["metrics"]["train/steps_per_s"])
        return f"{speeds[0]:.2f} steps/s with, {speeds[1]:.2f} without"

    yield f"{base}, {tokens} tokens", measure


def invariance(bench: Bench) -> Iterator[Case]:
    """What products that do not depend on the number of rows cost, and what jobs share by them."""
    base, tokens, jobs = ("0.6B", 512, 4) if bench.on_gpu else ("small", 16, 2)

    def measure(value: str) -> str:
        if value == "true" and not find_spec("megatron"):
            raise Failed("not measured: megatron-core is not installed")
        if value == "true" and not bench.on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise Failed("not measured: without a GPU it needs TRITON_INTERPRET=1")
        words = [*_rows(bench, base, tokens), f"batch_invariant={value}"]
        steps, name = (20 if bench.on_gpu else 1), f"invariant-{value}"
        if value == "true":  # compiles the kernels
            bench.sweep(f"{name}-first", *words, "train.max_steps=1", "seed=0", alone=True)
        words.append(f"train.max_steps={steps}")
        (alone,) = bench.sweep(f"{name}-alone", *words, "seed=0", alone=True)
        pack = bench.sweep(name, *words, "seed=" + ",".join(map(str, range(jobs))))
        seconds = sum(record["metrics"]["train/seconds"] for record in pack)
        shared, proven = (pack[0]["lockstep"][key] for key in ("products_together", "proven"))
        equal = bench.weights(f"{name}-alone")[0] == bench.weights(name)[0]
        text = f"alone {alone['metrics']['train/seconds']:.1f} s, pack of {jobs} {seconds:.1f} s"
        return f"{text}, {shared:.0%} of products shared; equal: {equal}, proven: {proven}"

    for value in ("false", "true"):
        yield f"{base}, {tokens} tokens, batch_invariant={value}", partial(measure, value)


def memory(bench: Bench) -> Iterator[Case]:
    """The estimate beside the peak of the runs of `speed`."""
    for folder in sorted(bench.scratch.glob("speed-*")):
        _, base, tokens, *jobs = folder.name.split("-")
        if jobs:
            continue

        def measure(folder: Path = folder, base: str = base, tokens: str = tokens) -> str:
            peak = json.loads((folder / "0" / "run.json").read_text())["metrics"]["peak_bytes"]
            words = ["-m", "lora_exp.cli", "estimate", "--json", *_rows(bench, base, int(tokens))]
            answer = json.loads(bench.command(*words))
            (total,) = (row["total"] for row in answer["rows"] if row["chosen"])
            shown = f"estimate {total / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB"
            return f"{shown}: {total / peak:.2f}x"

        yield f"{base}, {tokens} tokens", measure
