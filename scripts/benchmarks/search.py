"""Early stopping and search: what they save, what they find, and whether kills change it."""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from benchmarks.commands import ROOT, in_processes, run, sweep, timed, weights

GRIDS = {  # 27 cells each, of 54 steps: halving compares at steps 6 and 18
    "ranks, targets, rates": [
        "peft.r=4,8,16", "targets=qv,attention,all_linear", "train.learning_rate=5e-4,1e-3,3e-3",
    ],
    "rates, dropout, batch": [
        "train.learning_rate=5e-4,1e-3,3e-3", "peft.lora_dropout=0,0.1,0.3",
        "train.per_device_train_batch_size=4,8,16",
    ],
}  # fmt: skip


def halving(scratch: Path, seeds: int) -> None:
    """Grids of 27 jobs trained to their end and halved, a seed each; the chosen job alone, too."""
    print("| grid | seed | job-steps | best | chosen | off | equal adapter | all, s | halved, s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for seed, (label, grid) in itertools.product(range(1, seeds + 1), GRIDS.items()):
        common = [*grid, f"seed={seed}", "train.max_steps=54", "train.save_strategy=no"]
        folders = [scratch / f"{label[:5]}-{seed}-{kind}" for kind in ("all", "halved")]
        seconds, all_jobs = sweep(folders[0], *common)
        faster, halved = sweep(folders[1], *common, "early_stopping=halving")
        steps = [json.loads((folders[1] / n / "run.json").read_text())["steps"] for n in halved]
        best, chosen = next(iter(all_jobs)), next(iter(halved))
        losses_of = [all_jobs[n]["objective"] for n in (best, chosen)]
        cell = [f"{key}={value}" for key, value in all_jobs[chosen]["overrides"].items()]
        alone = scratch / f"{label[:5]}-{seed}-alone"
        run(alone / chosen, *cell)
        same = len({weights(folder)[chosen] for folder in (*folders, alone)}) == 1
        row = f"| {label} | {seed} | {sum(steps) / 54 / 27:.1%} | {best} | {chosen} |"
        row += f" {losses_of[1] / losses_of[0] - 1:.1%} | {same} | {seconds:.0f} | {faster:.0f} |"
        print(row, flush=True)


def halved_makespan(scratch: Path, batches: list[str]) -> None:
    """27 jobs: in processes of their own, one by one in one process, and halved in two workers.

    With one thread a process, so that all have the same bits; a third of the processes is run with
    as many threads as there are cores, too, and counted three times.
    """
    grid = GRIDS["ranks, targets, rates"]
    values = [[f"{key}={v}" for v in text.split(",")] for key, text in (g.split("=") for g in grid)]
    cells = [list(cell) for cell in itertools.product(*values)]
    print("| batch | 27 processes, s | all threads, s | one process, s | halved, s | to each |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch in batches:
        steps = ["train.max_steps=54", f"train.per_device_train_batch_size={batch}"]
        stopping = [*grid, *steps, "early_stopping=halving", "hydra.launcher.workers=2"]
        os.environ["OMP_NUM_THREADS"] = "1"
        times = [sweep(scratch / f"halved{batch}", *stopping)[0]]
        alone, threaded = in_processes(scratch / f"single{batch}", cells, steps, every=3)
        basic = sweep(scratch / f"one{batch}", *grid, *steps, "hydra/launcher=basic")[0]
        times.append(sweep(scratch / f"again{batch}", *stopping)[0])
        ours = statistics.mean(times)
        row = f"| {batch} | {alone:.0f} | {threaded:.0f} | {basic:.0f} |"
        ratios = ", ".join(f"{seconds / ours:.1f}x" for seconds in (alone, threaded, basic))
        print(f"{row} {times[0]:.0f}, {times[1]:.0f} | {ratios} |", flush=True)


def kills(scratch: Path, count: int) -> None:
    """Kill a halved sweep at random moments and resume it: values, verdicts and winner."""
    grid = ["peft=lora,dora", "train.learning_rate=1e-4,1e-3,3e-3", "train.max_steps=18"]
    grid += ["early_stopping=halving", "early_stopping.eta=2", "samples.rows=0"]
    grid += ["data.max_rows=256"]

    def outcome(folder: Path) -> list:
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("*/run.json"))]
        return [weights(folder), *((r["status"], r["stopped"], r["rungs"]) for r in records)]

    seconds, _ = sweep(scratch / "whole", *grid)
    expected, draw, equal = outcome(scratch / "whole"), random.Random(0), 0
    for i in range(count):
        folder, limit = scratch / f"killed{i}", ("2", "8")[i % 2]
        words = [sys.executable, "run.py", "-m", *grid, f"hydra.sweep.dir={folder}"]
        words += ["tracking=none", f"lockstep.max_jobs={limit}"]
        for _ in range(3):
            process = subprocess.Popen(
                words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0.2, 0.9) * seconds)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        timed(*words)
        equal += outcome(folder) == expected
        print(f"| max_jobs={limit}, killed three times | {equal} of {i + 1} equal |", flush=True)


# the grid's ranks, targets and rates, and all between them
SPACE = [
    "peft.r=tag(log,int(interval(4,16)))", "targets=qv,attention,all_linear",
    "train.learning_rate=tag(log,interval(5e-4,3e-3))",
]  # fmt: skip


def samplers(scratch: Path, seeds: int, settings: list[str]) -> None:
    """The best objective of a grid, of as many random trials and of TPE's, a seed each."""
    steps = ["train.max_steps=54", "train.eval_strategy=no", "train.save_strategy=no"]
    steps += ["samples.rows=0", *settings]
    found: dict[str, list[tuple[float, float]]] = {}
    print("| by | seed | job-steps | best of as many as the grid | best of all | its job |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed, sampler in itertools.product(range(1, seeds + 1), ("grid", "random", "tpe")):
        batch = 8 if sampler == "tpe" else 32  # what learns nothing is trained by one worker
        asked = [f"hydra.sweeper.{key}" for key in (f"sampler={sampler}", f"batch={batch}")]
        asked += ["hydra/sweeper=search", f"hydra.sweeper.seed={seed}"]
        space = GRIDS["ranks, targets, rates"] if sampler == "grid" else SPACE
        folder = scratch / f"{sampler}-{seed}"
        jobs = sweep(folder, *space, *asked, f"seed={seed}", *steps)[1]
        if sampler == "grid":
            cells = len(jobs)
        records = [json.loads((folder / n / "run.json").read_text()) for n in jobs]
        ended = {int(n): j["objective"] for n, j in jobs.items() if j["objective"] is not None}
        bests = min(value for n, value in ended.items() if n < cells)
        name, best = next(iter(jobs.items()))
        cell = " ".join(best["overrides"][key.partition("=")[0]] for key in SPACE)
        found.setdefault(sampler, []).append((bests, best["objective"]))
        row = f"| {sampler} | {seed} | {sum(r['steps'] for r in records)} of {len(jobs)} trials |"
        print(f"{row} {bests:.4f} | {best['objective']:.4f} | {name}: {cell} |", flush=True)
    for sampler, pairs in found.items():
        columns = list(zip(*pairs, strict=True))
        shown = [f"{statistics.median(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in columns]
        print(f"| {sampler} | {seeds} seeds | | {' | '.join(shown)} | |", flush=True)


def search(*arguments: str) -> None:
    """What early stopping saves and finds, whether kills change it, and who proposes best."""
    settings = [a for a in arguments if "=" in a]
    numbers = [a for a in arguments if a.isdigit()]
    parts = [a for a in arguments if a not in settings + numbers]
    parts = parts or ["halving", "makespan", "kills", "samplers"]
    with tempfile.TemporaryDirectory() as name:
        if "halving" in parts:
            halving(Path(name), int(numbers[0]) if numbers else 5)
        if "makespan" in parts:
            halved_makespan(Path(name), numbers or ["4", "16"])
        if "kills" in parts:
            kills(Path(name), int(numbers[0]) if numbers else 10)
        if "samplers" in parts:
            samplers(Path(name), int(numbers[0]) if numbers else 5, settings)
