"""What an executor takes for a pack, beside the launcher and the pack's own process."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from benchmarks.commands import QUIET, ROOT, spread, sweep, timed

PROGRAM = "hydra_plugins.lockstep_launcher"
PACK = ["peft.r=4,8", "train.max_steps=10", "report=null", *QUIET]


def clusters(stack: ExitStack, scratch: Path) -> Iterator[str]:
    """Start the clusters that this machine can have, and yield their executors."""
    sys.path.insert(0, str(ROOT))
    from tests import slurm

    if why := slurm.obstacle():
        print(f"no Slurm: {why}")
    else:
        (scratch / "nodes").mkdir()
        os.environ["SLURM_CONF"] = str(stack.enter_context(slurm.cluster(scratch / "nodes")))
        yield "slurm"
    if find_spec("ray") is None:
        print('no Ray: pip install "lora-exp[ray]"')
    else:
        from tests.ray_nodes import two_nodes

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
        os.environ["RAY_ADDRESS"] = stack.enter_context(two_nodes(folder))[0]
        yield "ray"


def forget(folder: Path) -> None:
    """Remove what the jobs of a sweep have left."""
    for job in folder.glob("[0-9]"):
        shutil.rmtree(job)


def executors(rounds: str = "5") -> None:
    """Time sweeps of one pack by each executor, in turn, and what they consist of.

    That is the launcher, timed with a sweep whose jobs have ended before, and the command that a
    cluster runs for the pack. Overhead is what a sweep takes beyond both.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [*clusters(stack, scratch), "local"]
        if names == ["local"]:
            sys.exit("without a cluster there is no command that could be timed")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        alone: list[float] = []
        for _ in range(int(rounds)):
            for name in names:
                command = [*PACK, f"hydra.launcher.executor={name}"]
                forget(scratch / name)
                whole = sweep(scratch / name, *command)[0]
                times[name].append((whole, sweep(scratch / name, *command)[0]))
            forget(scratch / names[0])
            share = scratch / names[0] / names[0] / "0" / "0"
            seconds, done = timed(sys.executable, "-m", PROGRAM, str(share))
            assert done.returncode == 0, done.stderr
            alone.append(seconds)
        print(f"the command of the pack alone: {spread(alone)} s\n")
        print("| executor | a sweep of one pack, s | its launcher alone, s | overhead, s |")
        print("|---|---|---|---|")
        for name, pairs in times.items():
            rest = [w - launcher - a for (w, launcher), a in zip(pairs, alone, strict=True)]
            cells = map(spread, (*map(list, zip(*pairs, strict=True)), rest))
            print(f"| {name} | {' | '.join(cells)} |")
