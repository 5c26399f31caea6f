"""`python -m hydra_plugins.lockstep_launcher SHARE [PARENT]`: a share, as `Cluster` wrote it.

The command can be repeated: jobs that have finished are not run again, others go on from their
newest checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.utils import configure_log
from hydra.types import HydraContext, RunMode

from hydra_plugins.lockstep_launcher._cells import Cells
from hydra_plugins.lockstep_launcher.launcher import LockstepLauncher
from lora_exp.__main__ import job as task
from lora_exp.__main__ import raise_file_limit
from lora_exp.child import end_with_parent
from lora_exp.config.overrides import quoted
from lora_exp.errors import Interrupted
from lora_exp.files.lock import in_use
from lora_exp.lockstep import devices
from lora_exp.lockstep.brackets import brackets_of
from lora_exp.lockstep.events import EventFile
from lora_exp.lockstep.plan import Job
from lora_exp.lockstep.work import apart, together
from lora_exp.lockstep.worker import carry_out
from lora_exp.training.interruption import EXIT_CODE, stop

LEAVE_S = 120.0  # for a process that had the share before: it saves, or NFS frees its locks


def main(share: Path, parent: int | None = None) -> None:
    """Run the jobs of a share; the exit code is 75 if a signal has asked to stop.

    Args:
        share: its file without a suffix; `.json` has the jobs, `.jsonl` gets their events.
        parent: the process with which this one stops; None: it outlives it.
    """
    devices.keep_one()
    raise_file_limit()
    values = json.loads(share.with_suffix(".json").read_text(encoding="utf-8"))
    try:
        with stop.listening():
            if parent is not None:
                end_with_parent(parent)
            launcher, jobs = composed(values)
            _wait_until_free(jobs)
            brackets = brackets_of(jobs, values["brackets"])
            names = {int(number): name for number, name in values["names"].items()}
            work = apart(jobs, brackets) if values["apart"] else together(jobs, brackets, names)
            events = EventFile(share.with_suffix(".jsonl"))
            carry_out(work, events, launcher.hydra_context, task)
            stop.check()
    except Interrupted:
        sys.exit(EXIT_CODE)


def _wait_until_free(jobs: Iterable[Job]) -> None:
    until = time.monotonic() + LEAVE_S
    while any(in_use(job.directory) for job in jobs) and time.monotonic() < until:
        time.sleep(0.2)


def composed(values: dict[str, Any]) -> tuple[LockstepLauncher, list[Job]]:
    """Compose the jobs of a share as its launcher has composed them."""
    version.setbase("1.3")
    path = create_config_search_path(values["conf"])
    for folder in values["config_dirs"]:
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    loader = Hydra.create_main_hydra2("run", path).config_loader
    context = HydraContext(config_loader=loader, callbacks=Callbacks())
    launcher, jobs = LockstepLauncher(), dict[str, Job]()
    folders = values["sweep_dirs"]
    for folder in dict.fromkeys(folders.values()):  # one, unless it refers to keys of the jobs
        own = {number: job for number, job in values["jobs"].items() if folders[number] == folder}
        overrides = [*values["overrides"], f"hydra.sweep.dir={quoted(folder)}"]
        overrides += next(iter(own.values()))
        config = loader.load_configuration(values["config_name"], overrides, RunMode.MULTIRUN)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        launcher.setup(hydra_context=context, task_function=task, config=config)
        cells = Cells(launcher, True, values["exclude_keys"])
        jobs |= {number: cells.job(job, int(number)) for number, job in own.items()}
    return launcher, [jobs[number] for number in values["jobs"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
