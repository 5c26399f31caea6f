"""Packs beside runs alone: equality, makespan, memory, and a real model."""

import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.commands import ROOT, in_processes, sweep, weights

RANKS, RATES = (4, 8, 16, 32), ("5e-4", "1e-3", "2e-3", "4e-3")
SWEEP = ["peft.r=" + ",".join(map(str, RANKS)), "train.learning_rate=" + ",".join(RATES)]


def losses(folder: Path) -> list[list[float]]:
    """Return each job's logged training losses."""
    texts = [f.read_text().splitlines() for f in sorted(folder.glob("*/metrics.jsonl"))]
    lines = [[json.loads(line) for line in text] for text in texts]
    return [[line["train/loss"] for line in job if "train/loss" in line] for job in lines]


def equality(scratch: Path) -> None:
    """A sweep in lockstep beside the same jobs one by one: losses and adapters."""
    unlike = ["peft.r=4,16", "train.per_device_train_batch_size=2,3", "peft.lora_dropout=0.1"]
    unlike += ["train.gradient_accumulation_steps=1,2", "train.max_steps=20", "samples.rows=0"]
    unlike += ["train.logging_steps=1", "train.eval_strategy=no", "train.save_strategy=no"]
    unlike += ["train.learning_rate=1e-3"]  # an unstable run would magnify any rounding
    print("| base | trainer | mode | max loss difference | equal adapters |")
    print("|---|---|---|---|---|", flush=True)
    for quant, algorithm in itertools.product(("none", "nf4", "int8"), ("sft", "pretrain")):
        chosen = [*unlike, f"quant={quant}", f"algorithm={algorithm}"]
        folders = {name: scratch / f"{quant}-{algorithm}-{name}" for name in ("a", "exact", "bmm")}
        sweep(folders["a"], *chosen, "hydra/launcher=basic")
        for mode in ("exact", "bmm"):
            sweep(folders[mode], *chosen, f"lockstep.mode={mode}")
            pairs = zip(losses(folders["a"]), losses(folders[mode]), strict=True)
            off = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
            alone, together = weights(folders["a"]), weights(folders[mode])
            same = sum(alone[n] == together[n] for n in alone)
            row = f"| {quant} | {algorithm} | {mode} | {off:.1e} | {same} of {len(alone)} |"
            print(row, flush=True)


def makespan(scratch: Path, batches: list[str]) -> None:
    """16 jobs in processes of their own, one by one in one process, and in lockstep in two workers.

    With one thread a process, so that all have the same bits; a quarter of the processes is run
    with as many threads as there are cores, too, and counted four times, and so is one process.
    """
    pairs = itertools.product(RANKS, RATES)
    cells = [[f"peft.r={r}", f"train.learning_rate={rate}"] for r, rate in pairs]
    print("| batch | 16 processes, s | all threads | one process, s | all threads |", end="")
    print(" lockstep, s | to each |\n|---|---|---|---|---|---|---|", flush=True)
    for batch in batches:
        steps = ["train.max_steps=50", f"train.per_device_train_batch_size={batch}"]
        two = [*SWEEP, *steps, "hydra.launcher.workers=2"]
        os.environ["OMP_NUM_THREADS"] = "1"
        times = [sweep(scratch / f"lockstep{batch}", *two)[0]]
        alone, threaded = in_processes(scratch / f"single{batch}", cells, steps, every=4)
        basic = sweep(scratch / f"basic{batch}", *SWEEP, *steps, "hydra/launcher=basic")[0]
        times.append(sweep(scratch / f"again{batch}", *two)[0])
        del os.environ["OMP_NUM_THREADS"]
        both = sweep(scratch / f"both{batch}", *SWEEP, *steps, "hydra/launcher=basic")[0]
        assert weights(scratch / f"lockstep{batch}") == weights(scratch / f"basic{batch}")
        others, ours = (alone, threaded, basic, both), statistics.mean(times)
        row = f"| {batch} | {' | '.join(f'{seconds:.0f}' for seconds in others)} |"
        ratios = ", ".join(f"{seconds / ours:.2f}x" for seconds in others)
        print(f"{row} {times[0]:.0f}, {times[1]:.0f} | {ratios} |", flush=True)


def workers(scratch: Path) -> None:
    """8 jobs on two bases in one worker with all threads, and in two with half of them each."""
    jobs = ["model.dtype=float32,bfloat16", "peft.r=8,16", "train.learning_rate=1e-3,3e-3"]
    jobs += ["train.max_steps=50"]
    print("| workers | threads of each | s |\n|---|---|---|", flush=True)
    for n, count in enumerate((1, 2, 2, 1)):
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        here = f"hydra.launcher.workers={count}"
        seconds = sweep(scratch / f"workers{n}", *jobs, here)[0]
        print(f"| {count} | {threads} | {seconds:.0f} |", flush=True)


def memory(scratch: Path, model: list[str]) -> None:
    """The peak of packs of 1, 2, 4 and 8 jobs on one nf4 base."""
    print("| jobs | peak, MiB | for each job beyond the first, MiB |")
    print("|---|---|---|", flush=True)
    first = 0.0
    for jobs in (1, 2, 4, 8):
        seeds = "seed=" + ",".join(map(str, range(jobs)))
        steps = ["train.max_steps=3", "train.per_device_train_batch_size=1", "samples.rows=0"]
        steps += ["train.eval_strategy=no", "train.save_strategy=no", "data.max_rows=16"]
        steps += ["data.max_eval_rows=2", "quant=nf4", "lockstep.max_jobs=8", *model]
        found = sweep(scratch / f"memory{jobs}", seeds, *steps)[1]
        peak = max(job["metrics"]["peak_bytes"] for job in found.values()) / 2**20
        first = first or peak
        more = f"{(peak - first) / (jobs - 1):.0f}" if jobs > 1 else ""
        print(f"| {jobs} | {peak:.0f} | {more} |", flush=True)


def real(scratch: Path, model: list[str], threads_of: list[str]) -> None:
    """Four jobs of batch 4, rows of 128 tokens, on a real model: together and one by one."""
    words = (ROOT / "docs/lockstep.md").read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 200])}) for i in range(64)]
    (scratch / "rows.jsonl").write_text("\n".join(lines) + "\n")
    common = [
        "algorithm=pretrain", "data=jsonl", f"data.path={scratch / 'rows.jsonl'}",
        "data.eval_share=0", "algorithm.args.max_length=128", "train.max_steps=4",
        "train.per_device_train_batch_size=4", "train.save_strategy=no", "samples.rows=0",
        "train.learning_rate=2e-4", "peft.r=4,8,16,32", *model,
    ]  # fmt: skip
    print("| base | threads | one by one, s | lockstep, s | ratio | products together | verified |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for quant, threads in itertools.product(("none", "nf4"), threads_of):
        os.environ["OMP_NUM_THREADS"] = threads
        name = f"{quant}-{threads}"
        one, _ = sweep(scratch / f"{name}-one", *common, f"quant={quant}", "hydra/launcher=basic")
        pack, _ = sweep(scratch / f"{name}-pack", *common, f"quant={quant}")
        assert weights(scratch / f"{name}-one") == weights(scratch / f"{name}-pack")
        record = json.loads((scratch / f"{name}-pack" / "0" / "run.json").read_text())["lockstep"]
        shared = f"{record['products_together']:.0%} | {record['verified']} of {record['passes']} |"
        row = f"| {quant} | {threads} | {one:.0f} | {pack:.0f} | {one / pack:.2f}x | {shared}"
        print(row, flush=True)


def lockstep(*arguments: str) -> None:
    """Equality, makespan and memory of packs; `workers` and `real` where they are asked for."""
    model = [a for a in arguments if "=" in a]
    parts = [a for a in arguments if "=" not in a] or ["equality", "makespan", "memory"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if "equality" in parts:
            equality(scratch)
        if "makespan" in parts:
            makespan(scratch, [a for a in parts if a.isdigit()] or ["1", "4", "16"])
        if "workers" in parts:
            workers(scratch)
        if "memory" in parts:
            memory(scratch, model)
        if "real" in parts:
            real(scratch, model, [a for a in parts if a.isdigit()] or ["1", "2"])
