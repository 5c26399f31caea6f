"""`scripts/bench gpu`: what only a GPU can tell, in one Markdown table.

Bases have random weights in the shapes of real models, made on the spot. Each part has a time
budget; what fails or is too slow is a row that says so. `--device cpu` runs the same at tiny sizes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.bench import Bench, Case, Failed
from benchmarks.gpu.checks import bases, checks, machine, tests
from benchmarks.gpu.speed import determinism, invariance, memory, profiles, speed

SECONDS = {"quick": 330, "full": 1200}
HEAD = "| part | case | result | s |\n|---|---|---|---|"
# the part, its seconds in quick and full, and how many of its cases run at once on a GPU
PARTS: dict[Callable[[Bench], Iterator[Case]], tuple[int, int, int]] = {
    machine: (20, 20, 1),
    bases: (100, 150, 2),
    checks: (110, 240, 4),
    speed: (110, 560, 1),
    profiles: (60, 120, 1),
    memory: (20, 60, 4),
    determinism: (30, 60, 1),
    invariance: (30, 60, 1),
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
