"""The composed run beside a plain script of the same trainer, model, rows and settings."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.commands import QUIET, run, spread, timed

STEPS = 300
PLAIN = (sys.executable, str(Path(__file__).with_name("plain.py")))


def digest(folder: Path) -> str:
    """Return one hash over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def composed() -> None:
    """Start-up, refusal, speed beside a plain script, and equality of two equal runs."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wall = [run(scratch / f"demo{i}")[0] for i in range(3)]
        print(f"| `python run.py`, wall seconds | {spread(wall)} |", flush=True)
        shown = [timed(sys.executable, "run.py", "--cfg", "job")[0] for _ in range(5)]
        print(f"| `python run.py --cfg job`, wall seconds | {spread(shown)} |", flush=True)
        faulty = [timed(sys.executable, "run.py", "+peft.lora_alpa=1")[0] for _ in range(5)]
        print(f"| a faulty config refused, wall seconds | {spread(faulty)} |", flush=True)
        ours, plain, losses = [], [], set()
        for i in range(6):
            for ours_next in (True, False) if i % 2 else (False, True):  # a b b a
                if ours_next:
                    record = run(scratch / f"speed{i}", f"train.max_steps={STEPS}", *QUIET)[1]
                    ours.append(record["metrics"]["train/steps_per_s"])
                    losses.add(record["metrics"]["train/loss"])
                else:
                    done = timed(*PLAIN, str(scratch / f"plain{i}"), str(STEPS))[1]
                    speed, loss = json.loads(done.stdout.splitlines()[-1])
                    plain.append(speed)
                    losses.add(loss)
        ratios = [a / b for a, b in zip(ours, plain, strict=True)]
        print(f"| steps/s of ours | {spread(ours)} |")
        print(f"| steps/s of a plain script of the same trainer | {spread(plain)} |")
        print(f"| ratio, ours to plain, pair by pair | {spread(ratios)} |")
        print(f"| last training loss of both, all runs | {sorted(losses)} |", flush=True)
        same = {digest(scratch / f"demo{i}" / "adapter") for i in range(3)}
        print(f"| different adapter directories of three equal runs | {len(same) - 1} |")
