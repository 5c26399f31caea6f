"""Where the time of training steps goes: profiled_steps FOLDER JOBS OVERRIDE ...

Four training steps under the profiler, then four in which each wait for the device is counted.
"""

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lora_exp import compose, run
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row

ON_GPU = torch.cuda.is_available()
WARM, WINDOW = 3, 4  # steps before the profiler, and under it
training_step = transformers.Trainer.training_step


class Steps:
    """The training steps of all jobs, counted as they begin."""

    def __init__(self, jobs: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
        self.jobs, self.begun, self.profiler = jobs, 0, profile(activities=activities)
        self.measured: dict[str, float] = {}
        self.waits: Counter[str] = Counter()  # by the line of code that waits

    def begin(self) -> None:
        """Start or end what is measured, before a job's step."""
        if self.begun == WARM * self.jobs:
            _wait()
            self.profiler.start()
            self.started = time.perf_counter()
        if self.begun == (WARM + WINDOW) * self.jobs:
            _wait()
            seconds = time.perf_counter() - self.started
            self.profiler.stop()
            self.measured = _shares(self.profiler.key_averages(), seconds)
            self._count_waits()
        if self.begun == (WARM + 2 * WINDOW) * self.jobs and ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
        self.begun += 1

    def _count_waits(self) -> None:
        def count(text: Any, kind: Any, file: str, line: int, *_: Any) -> None:
            if "synchroniz" in str(text):
                self.waits.update([f"{Path(file).name}:{line}"])

        warnings.simplefilter("always")
        warnings.showwarning = count
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _shares(events: Any, seconds: float) -> dict[str, float]:
    """Return the seconds of a step, and the shares of them that were spent on what."""
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    own = [e for e in events if e.device_type == DeviceType.CUDA] if ON_GPU else on_cpu
    launches = [e for e in on_cpu if "Launch" in e.key]

    def share(chosen: list[Any], field: str) -> float:
        return sum(getattr(event, field) for event in chosen) / seconds / 1e6

    own_time = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    return {
        "step": seconds / WINDOW,
        "busy": share(own, own_time),
        "launching": share(launches, "self_cpu_time_total"),
        "launches": sum(e.count for e in launches) / WINDOW,
        "dequantising": share([e for e in own if "dequant" in e.key.lower()], own_time),
        "waiting": share([e for e in on_cpu if "Synchronize" in e.key], "self_cpu_time_total"),
    }


def main(folder: Path, jobs: int, *overrides: str) -> None:
    """Train the jobs, in a pack if there are several, and print what was measured as JSON."""
    steps = Steps(jobs)

    def counted(*arguments: Any, **options: Any) -> Any:
        steps.begin()
        return training_step(*arguments, **options)

    transformers.Trainer.training_step = counted
    pack = Pack("exact", jobs, 0)

    def train(n: int) -> None:
        cfg = compose(*overrides, f"seed={n}", f"train.max_steps={WARM + 2 * WINDOW + 1}")
        seat = Seat(pack, n, Row(n, str(n)), n, None) if jobs > 1 else None
        run(cfg, folder / str(n), place=seat)

    if jobs > 1:
        pack.hub.run((lambda n=n: train(n)) for n in range(jobs))
    else:
        train(0)
    places = [f"{place} ({n / WINDOW:g})" for place, n in steps.waits.most_common(4)]
    syncs = steps.waits.total() / WINDOW
    print(json.dumps(steps.measured | {"syncs": syncs, "places": places}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
