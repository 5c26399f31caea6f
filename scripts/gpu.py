"""`scripts/bench gpu`: what only a GPU can tell, in one Markdown table.

Bases have random weights in the shapes of real models, made on the spot. Each part has a time
budget; what fails or is too slow is a row that says so. `--device cpu` runs the same at tiny sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = {"quick": 330, "full": 1200}
HEAD = "| part | case | result | s |\n|---|---|---|---|"


class Shape(NamedTuple):
    """A base with random weights."""

    channels: int
    inner: int
    layers: int
    heads: int
    heads_kv: int
    vocabulary: int
    saved_as: str = "bf16"  # or nf4, so that it is not quantised at each start


BASES = {  # of Qwen3 0.6B (and four of its layers), Qwen3 1.7B and Llama 3 8B
    "small": Shape(1024, 3072, 4, 16, 8, 151936),
    "0.6B": Shape(1024, 3072, 28, 16, 8, 151936),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 151936),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, "nf4"),
}
TINY = {"small": Shape(64, 128, 2, 2, 1, 512), "8B": Shape(64, 128, 2, 2, 1, 512, "nf4")}
# base, tokens of a job's step, jobs
QUICK_GRID = [("0.6B", 128, 8), ("0.6B", 2048, 8), ("8B", 128, 8)]
FULL_GRID = [
    (b, t, n) for t in (128, 512, 2048) for b in ("0.6B", "8B", "1.7B") for n in (4, 8, 16)
]

MAKE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig
from transformers import LlamaForCausalLM
device = "cuda" if torch.cuda.is_available() else "cpu"
for folder, (c, inner, layers, heads, heads_kv, vocabulary, saved_as) in json.loads(sys.argv[1]):
    config = LlamaConfig(
        hidden_size=c, intermediate_size=inner, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=heads, num_key_value_heads=heads_kv, vocab_size=vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=saved_as != "nf4",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    if saved_as == "nf4":
        del model
        form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=form, dtype=torch.bfloat16, device_map={"": device})
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("lora_exp/assets/tiny").save_pretrained(folder)
    del model
"""

# four training steps under the profiler, then four that name what waits for the device
PROFILE = """
import collections, json, sys, time, warnings
from pathlib import Path
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from lora_exp import compose, run
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row
folder, jobs, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
on_gpu, warm, window = torch.cuda.is_available(), 3, 4
activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
profiler, calls, found, places = profile(activities=activities), 0, {}, collections.Counter()
plain_step = transformers.Trainer.training_step
def wait():
    if on_gpu:
        torch.cuda.synchronize()
def profiled(seconds):
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    launches = [e for e in on_cpu if "Launch" in e.key]
    waits = [e for e in on_cpu if "Synchronize" in e.key]
    spent = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    of = lambda chosen, time_of: sum(map(time_of, chosen)) / seconds / 1e6
    own = kernels if on_gpu else on_cpu
    dequantising = [e for e in own if "dequant" in e.key.lower()]
    cpu_time = lambda e: e.self_cpu_time_total
    return {"step": seconds / window, "busy": of(own, spent), "launching": of(launches, cpu_time),
        "launches": sum(e.count for e in launches) / window,
        "dequantising": of(dequantising, spent), "waiting": of(waits, cpu_time)}
def step(*arguments, **options):
    global calls, started
    if calls == warm * jobs:
        wait()
        profiler.start()
        started = time.perf_counter()
    if calls == (warm + window) * jobs:
        wait()
        seconds = time.perf_counter() - started
        profiler.stop()
        found.update(profiled(seconds))
        warnings.simplefilter("always")
        warnings.showwarning = lambda text, kind, file, line, *_: (
            places.update([f"{Path(file).name}:{line}"]) if "synchroniz" in str(text) else None)
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
    if calls == (warm + 2 * window) * jobs and on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    calls += 1
    return plain_step(*arguments, **options)
transformers.Trainer.training_step = step
pack = Pack("exact", jobs, 0)
def train(n):
    cfg = compose(*overrides, f"seed={n}", f"train.max_steps={warm + 2 * window + 1}")
    run(cfg, folder / str(n), place=Seat(pack, n, Row(n, str(n)), n, None) if jobs > 1 else None)
if jobs > 1:
    pack.hub.run((lambda n=n: train(n)) for n in range(jobs))
else:
    train(0)
found["syncs"] = sum(places.values()) / window
found["places"] = [f"{place} ({n / window:g})" for place, n in places.most_common(4)]
print(json.dumps(found))
"""


class Failed(Exception):
    """A measurement has no result; the text says why."""


def python(*arguments: str, timeout: float, env: dict[str, str]) -> Any:
    """Run Python in the repository; what it started ends with it."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@dataclass
class Bench:
    """One measuring: its bases, its folder, and until when its part may take."""

    level: str
    device: str
    scratch: Path
    words: tuple[str, ...] = ()  # cases are measured whose part or name has one of them
    until: float = 0.0  # of time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real measuring."""
        return self.device != "cpu"

    @property
    def bases(self) -> dict[str, Shape]:
        """Return the bases that are needed, by name."""
        if not self.on_gpu:
            return TINY
        return {n: s for n, s in BASES.items() if self.level == "full" or n != "1.7B"}

    def command(self, *arguments: str) -> str:
        """Run Python and return what it printed.

        Raises:
            Failed: it has failed, or the time of the part is over.
        """
        left = self.until - time.monotonic()
        hidden = {} if self.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        env = os.environ | hidden | {"HF_HUB_OFFLINE": "1", "TTY_COMPATIBLE": "0"}
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(arguments, left)
            done = python(*arguments, timeout=left, env=env)
        except subprocess.TimeoutExpired:
            raise Failed("not measured: the time of its part is over") from None
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
            raise Failed(f"**failed**: {lines[-1][:200].replace('|', '/')}")
        return str(done.stdout)

    def sweep(self, name: str, *overrides: str, alone: bool = False) -> list[dict[str, Any]]:
        """Train jobs, in a pack or one by one, and return the records in their order."""
        folder = self.scratch / name
        launcher = ["hydra/launcher=basic"] if alone else []
        words = ["run.py", "-m", *overrides, *launcher, f"hydra.sweep.dir={folder}"]
        self.command(*words, "tracking=none", "report=null")
        folders = sorted(folder.glob("*/run.json"), key=lambda path: int(path.parent.name))
        return [json.loads(path.read_text()) for path in folders]

    def base(self, name: str) -> list[str]:
        """Return the overrides that choose a base."""
        if not (self.scratch / name / "config.json").is_file():
            raise Failed(f"not measured: the base {name} was not made")
        return ["model=local", f"model.path={self.scratch / name}", "model.dtype=bfloat16"]

    def weights(self, name: str) -> list[str]:
        """Return the hashes of a sweep's adapters, in the order of their folders."""
        files = sorted((self.scratch / name).glob("**/adapter/adapter_model.safetensors"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    def compared(self, one: str, other: str) -> str:
        """Return whether the adapters of two sweeps have equal bytes, in words."""
        a, b = self.weights(one), self.weights(other)
        same = sum(x == y for x, y in zip(a, b, strict=False))
        if not a or len(a) != len(b):
            raise Failed(f"**failed**: {len(a)} and {len(b)} adapters were saved")
        return f"{same} of {len(a)} adapters equal" if same == len(a) else f"**{same} of {len(a)}**"


Case = tuple[str, Callable[[], str]]
SHORT = ["train.max_steps=6", "samples.rows=0", "train.eval_strategy=no", "train.logging_steps=1"]
SHORT += ["train.save_strategy=no", "train.learning_rate=1e-3", "data.max_rows=64"]
SHORT += ["data.max_eval_rows=8"]
JOBS = ["peft.r=4,16", "train.per_device_train_batch_size=2,3", "peft.lora_dropout=0.1"]


def bases(bench: Bench) -> Iterator[Case]:
    """Make each base."""
    for name, shape in bench.bases.items():

        def make(name: str = name, shape: Shape = shape) -> str:
            folder = bench.scratch / name
            bench.command("-c", MAKE, json.dumps([[str(folder), shape]]))
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
            output = bench.command("-c", PROFILE, str(folder), str(jobs), *words)
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


def tests(bench: Bench) -> Iterator[Case]:
    """Run the tests that need a GPU."""
    if bench.on_gpu and bench.level == "full":
        words = ["-m", "pytest", "-q", "tests/gpu"]
        yield "tests/gpu", lambda: bench.command(*words).strip().splitlines()[-1]


# the part, its seconds in quick and full, and how many of its cases run at once on a GPU
PARTS: dict[Callable[[Bench], Iterator[Case]], tuple[int, int, int]] = {
    machine: (20, 20, 1),
    bases: (100, 150, 2),
    checks: (110, 240, 4),
    speed: (110, 560, 1),
    profiles: (60, 120, 1),
    memory: (20, 60, 4),
    determinism: (30, 60, 1),
    tests: (0, 150, 1),
}


def measured(bench: Bench, part: str, case: Case) -> str:
    """Measure a case, and return its row."""
    started = time.monotonic()
    try:
        result = case[1]()
    except Failed as error:
        result = str(error)
    except (ArithmeticError, LookupError, OSError, ValueError) as error:  # an answer of other form
        result = f"**failed**: {type(error).__name__}: {error}"
    return f"| {part} | {case[0]} | {result} | {time.monotonic() - started:.0f} |"


def gpu(*arguments: str) -> None:
    """Measure all parts, those that the others need first.

    Args:
        arguments: `quick` or `full`; `--device cpu`; and words that cases or parts must have.
    """
    words = [word for word in arguments if word not in ("--device", "cpu", "cuda", *SECONDS)]
    level = next((word for word in arguments if word in SECONDS), "quick")
    device = "cpu" if "cpu" in arguments else "cuda"
    patience = 1 if device != "cpu" else 20  # a dry run is there to find mistakes
    end = time.monotonic() + SECONDS[level] * patience
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(level, device, Path(name), tuple(words))
        for part, (quick, full, at_once) in PARTS.items():
            budget = {"quick": quick, "full": full}[level] * patience
            bench.until = min(time.monotonic() + budget, end)
            cases = [c for c in part(bench) if part is bases or _asked(words, part.__name__, c[0])]
            with ThreadPoolExecutor(at_once if bench.on_gpu else 1) as pool:
                rows = pool.map(lambda case, part=part: measured(bench, part.__name__, case), cases)
                for row in rows:
                    print(row, flush=True)


def _asked(words: list[str], part: str, case: str) -> bool:
    return not words or any(word in f"{part} {case}" for word in words)
