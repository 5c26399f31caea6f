"""The demo of each algorithm, and PPO's step beside GRPO's."""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.commands import QUIET, run, spread, sweep, timed

OWN_TASKS = (sys.executable, str(Path(__file__).with_name("own_tasks.py")))
JUDGED = {
    "reward": ["accuracy"],
    "dpo": ["preference_accuracy", "exact_match"],
    "kto": ["preference_accuracy", "exact_match"],
    "grpo": ["reward", "kl", "exact_match"],
    "rloo": ["reward", "kl", "exact_match"],
    "ppo": ["reward", "kl", "exact_match"],
}


def algorithms(*names: str) -> None:
    """Each demo on none and nf4: seed 1 alone, by the clock, and seeds 2 and 3 in lockstep."""
    with tempfile.TemporaryDirectory() as name:
        for algorithm in names or JUDGED:
            for quant in ("none", "nf4"):
                folder = Path(name) / f"{algorithm}-{quant}"
                words = [f"experiment=demo_{algorithm}", f"quant={quant}"]
                wall, first = run(folder / "alone", *words, "seed=1", "tracking=none")
                others = sweep(folder / "sweep", *words, "seed=2,3")[1].values()
                records = [first, *others]
                shown = [f"{wall:.0f} s"]
                for metric in JUDGED[algorithm]:
                    pairs = [
                        [r["metrics"][f"{w}/{metric}"] for w in ("before", "eval")] for r in records
                    ]
                    before, after = zip(*pairs, strict=True)
                    shown.append(f"{metric} {_range(before)} -> {_range(after)}")
                if algorithm == "ppo":
                    shown += _value(folder / "alone")
                if algorithm != "reward":
                    saved = str(folder / "alone" / "adapter")
                    done = timed(*OWN_TASKS, saved, quant)[1]
                    shown.append(f"own tasks {float(done.stdout.splitlines()[-1]):.3f}")
                print(f"| {algorithm} | {quant} | {' | '.join(shown)} |", flush=True)


def _range(values: tuple[float, ...]) -> str:
    """Write mean (least to most)."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _value(folder: Path) -> list[str]:
    """Return a run's value loss at first and last, and the variance it explained at last."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "train/value_loss" in line]
    found = [(s["train/value_loss"], s["train/explained_variance"]) for s in steps]
    first = f"value loss {found[0][0]:.4f} -> {found[-1][0]:.4f}"
    return [first, f"explained variance {found[-1][1]:.3f}"]


def rollouts(*model: str) -> None:
    """PPO's step beside GRPO's on the same 64 answers, in turn; with a model, memory on nf4."""
    with tempfile.TemporaryDirectory() as name:
        same = [*QUIET, "train.max_steps=30", "++algorithm.args.num_iterations=1"]
        same += ["train.learning_rate=1e-9", "data.eval_rows=1"]  # answers stay as long as they are
        found: dict[str, list[float]] = {"grpo": [], "ppo": []}
        for i in range(3):
            for algorithm in found if i % 2 else reversed(found):
                folder = Path(name) / f"{algorithm}{i}"
                metrics = run(folder, f"experiment=demo_{algorithm}", *same)[1]["metrics"]
                found[algorithm].append(1 / metrics["train/steps_per_s"])
        for algorithm, seconds in found.items():
            print(f"| {algorithm} | {spread(seconds)} s a step |", flush=True)
        if not model:
            return
        common = [*model, *QUIET, "quant=nf4", "train.max_steps=2", "data=demo_pairs"]
        common += ["train.per_device_train_batch_size=8", "data.rows=64", "data.eval_rows=1"]
        answers = ["algorithm.rewards=[lora_exp.rewards.similarity]"]
        answers += ["algorithm.args.max_completion_length=16"]
        for algorithm, own in {"sft": [], "grpo": answers, "ppo": answers}.items():
            words = [f"algorithm={algorithm}", *common, *own]
            peak = run(Path(name) / f"memory-{algorithm}", *words)[1]["metrics"]["peak_bytes"]
            print(f"| {algorithm} | {peak / 2**20:.0f} MiB |", flush=True)
