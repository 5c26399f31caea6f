"""Sweeps as they lie on disk, written without training: curves, seeds, rungs, samples."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HOSTILE = (
    "</script><script>window.hurt=1</script><img src=x onerror='window.hurt=1'>\u2028&amp;{{7*7}}"
)


def write_sweep(
    folder: Path,
    ranks: Sequence[int] = (4, 8, 16),
    rates: Sequence[float] = (1e-4, 1e-3, 3e-3),
    seeds: Sequence[int] = (1, 2, 3),
    points: int = 40,
    prompts: int = 12,
    hostile: bool = False,
) -> Path:
    """Write a sweep of every rank, rate and seed, judged by eval/loss; jobs with 1e-4 are pruned.

    Args:
        folder: to be made.
        ranks: of `peft.r`.
        rates: of `train.learning_rate`.
        seeds: of `seed`.
        points: lines of the training loss, one each ten steps.
        prompts: samples of each run.
        hostile: put HTML and scripts into names, keys, values and rows.
    """
    random_numbers = random.Random(0)
    for number, (rank, rate, seed) in enumerate(itertools.product(ranks, rates, seeds)):
        best = (
            1.2 + 0.3 * math.log(rate / 2e-3) ** 2 / 9 + 0.5 / rank + random_numbers.gauss(0, 0.03)
        )
        overrides: dict[str, Any] = {"peft.r": rank, "train.learning_rate": rate, "seed": seed}
        if hostile:
            overrides["+train." + HOSTILE.replace("=", "")] = f"{HOSTILE}{number}"
        _write_job(folder / str(number), overrides, best, points, prompts, random_numbers, hostile)
    (folder / "sweep.json").write_text('["-m", "peft.r=4,8"]\n')
    return folder


def _write_job(
    folder: Path,
    overrides: dict[str, Any],
    best: float,
    points: int,
    prompts: int,
    random_numbers: random.Random,
    hostile: bool,
) -> None:
    (folder / ".hydra").mkdir(parents=True)
    rate, rank, all_steps = overrides["train.learning_rate"], overrides["peft.r"], points * 10
    is_pruned = rate <= 1e-4
    steps = all_steps // 4 if is_pruned else all_steps
    name = f"r{rank}-{HOSTILE}" if hostile else f"r{rank}-lr{rate:g}-seed{overrides['seed']}"
    lines, value = [{"step": 0, "eval/loss": 7.86, "eval/exact_match": 0.0}], 7.86
    for step in range(10, steps + 1, 10):
        value = best + (6 - best) * math.exp(-step * rate * 2e4 / all_steps / 3)
        noisy = value + random_numbers.gauss(0, 0.08)
        lines.append({"step": step, "train/loss": noisy, "train/tokens_per_s": 900.0})
        if step % (all_steps // 8 // 10 * 10 or 10) == 0:
            lines.append({"step": step, "eval/loss": value + 0.05, "eval/exact_match": 0.3})
    metrics = {
        "before/loss": 7.86, "before/exact_match": 0.0, "before/exact_match_mirror": 0.02,
        "before/exact_match_persona": 0.0, "eval/loss": value + 0.05, "train/loss": value,
        "train/seconds": 20.0 + rank + random_numbers.random(), "seconds": 30.0 + rank,
        "train/tokens_per_s": 900.0 - rank * 3, "peak_bytes": 1.4e9 + rank * 9e6,
    }  # fmt: skip
    if not is_pruned:
        quality = max(0.0, 1.9 - value)
        metrics |= {"eval/exact_match": quality, "eval/exact_match_mirror": quality * 0.7,
                    "eval/exact_match_persona": min(1.0, quality * 1.3)}  # fmt: skip
    rung = {
        "rung": 0,
        "step": all_steps // 4,
        "steps": all_steps,
        "value": value,
        "rank": 1,
        "of": 9,
    }
    record = {
        "name": name, "tracking_id": "x", "date": "2026-11-29", "status": "finished",
        "error": None, "choices": {"peft": "lora", "quant": "none"}, "metrics": metrics,
        "rungs": [rung] if is_pruned else [rung, rung | {"rung": 1, "step": all_steps // 2}],
        "fingerprint": f"{rank:032x}{int(rate * 1e6):032x}", "stopped": None,
        "versions": {"lora-exp": "0.1.0", "torch": "2.13.0"}, "place": "lockstep, exact",
        "counts": {"trainable_parameters": 14592 * rank, "parameters": 1927872,
                   "train_rows": 1000, "train_tokens": 36535},
        "data": {"rows.jsonl": "4cb1a057"}, "base": "sha256:23c579d9", "adapters": {},
        "steps": steps, "saved_step": steps, "objective": "eval/loss", "goal": "minimize",
        "resumed": [],
    }  # fmt: skip
    if is_pruned:
        stopped = {"rule": "halving", "step": steps, "value": value, "reason": "9 of 9 at step 100"}
        record |= {"status": "pruned", "stopped": stopped, "saved_step": None}
    config = {"name": name, "seed": overrides["seed"], "train": {"learning_rate": rate,
              "max_steps": all_steps}, "peft": {"r": rank, "lora_alpha": 2 * rank},
              "objective": "eval/loss", "goal": "minimize"}  # fmt: skip
    if hostile:
        config["train"] |= {HOSTILE: overrides["+train." + HOSTILE.replace("=", "")]}
    samples = [_sample(i, best, random_numbers, hostile) for i in range(prompts)]
    losses = [10 * (value + 0.05) + math.sin(7 * i + rank) for i in range(prompts)]
    by_row = {"rows": [*map(str, range(prompts))], "tokens": [10] * prompts, "losses": losses}
    updates = {f"model.layers.{i}.q_proj": i + rank * rate * 1e3 for i in range(4)}
    texts = {
        "row_losses.json": json.dumps(by_row), "updates.json": json.dumps(updates),
        "run.json": json.dumps(record), "config.yaml": yaml.safe_dump(config),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "samples.jsonl": "".join(json.dumps(sample) + "\n" for sample in samples),
        ".hydra/overrides.yaml": yaml.safe_dump([f"{k}={v}" for k, v in overrides.items()]),
    }  # fmt: skip
    for path, text in texts.items():
        (folder / path).write_text(text)


def _sample(
    number: int, best: float, random_numbers: random.Random, hostile: bool
) -> dict[str, Any]:
    letters = "abcdefgh"[: 3 + number % 4]
    expected = " ".join(letters + letters[::-1])
    is_right = number % 3 == 0 or random_numbers.random() < 2 - best
    answer = expected if is_right else " ".join(random_numbers.choices("abcdefgh", k=5))
    prompt = (
        f"<|im_start|>user\nMirror: {' '.join(letters)} {HOSTILE if hostile else ''}<|im_end|>\n"
    )
    return {
        "prompt": f"{prompt}<|im_start|>assistant\n", "expected": f"{expected}\n",
        "task": "mirror", "before": "I am a tiny", "after": answer + (HOSTILE if hostile else ""),
    }  # fmt: skip
