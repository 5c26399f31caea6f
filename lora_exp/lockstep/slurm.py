"""Slurm as an engine: submit a worker's command, list the user's jobs, cancel them.

submitit writes the batch script and submits it.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_exp.config.door import plain
from lora_exp.config.processes import THREADS
from lora_exp.config.ranges import Fault
from lora_exp.errors import ConfigError, ExtraError, LoraExpError
from lora_exp.files.redaction import redact
from lora_exp.lockstep.engine import State

KEY, NAME = "hydra.launcher.slurm", "lora-exp"  # of all jobs
ROOT = Path(__file__).parents[2]  # the folder of the package: nodes may not have it installed
# variables that tell which cluster, not of which job
OF_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
WARNING_S = 120  # before the time limit: jobs save at the end of their step
IN_QUEUE = {  # squeue(1): the states of jobs that have not ended
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT",
    "SIGNALING", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}  # fmt: skip
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # sbatch(1): minutes, or with units
GPUS = re.compile(r"(\w[\w.-]*:)?[01]")
MEMORY = re.compile(r"\d+[KMGT]?")
OPTION = re.compile(r"[a-z][a-z-]*")
OF_KEYS = {  # what sbatch says -> the key that it is about
    "partition": "partition", "account": "account", "gres": "gpus", "time limit": "time",
    "memory": "memory",
}  # fmt: skip
OF_OURS = {"partition", "account", "time", "cpus-per-task", "gpus-per-node", "mem", "job-name"}


class Slurm:
    """A cluster, and how jobs are submitted to it; an `Engine`."""

    name, unit = "slurm", "Slurm job"
    limit = 500  # of an array; Slurm's own is 1000 by default

    def __init__(self, section: Mapping[str, Any]) -> None:
        """Check `hydra.launcher.slurm`.

        Raises:
            ConfigError: values that sbatch would not take, or there is no sbatch here.
            ExtraError: submitit is missing.
        """
        if faults := list(_faults(section)):
            raise ConfigError(faults)
        if find_spec("submitit") is None:
            raise ExtraError('executor=slurm: submitit is missing: pip install "lora-exp[cluster]"')
        self.retries = int(section["retries"])
        self._parameters = _parameters(section)
        self._given = {key for key, value in section.items() if value is not None}

    def submit(self, command: Sequence[str], folder: Path, count: int) -> list[str]:
        """Submit a command, several times as an array; see `Engine.submit`."""
        from submitit import SlurmExecutor
        from submitit.helpers import clean_env

        executor, variables = SlurmExecutor(folder), [*os.environ.items()]
        file = f'{shlex.quote(str(folder))}/"${{SLURM_ARRAY_TASK_ID:-0}}"'
        executor.update_parameters(**self._parameters)
        if count > 1:
            executor.parameters["map_count"] = count
        try:
            # submitit prints what it raises; a Slurm job that launches has variables of its own
            with redirect_stderr(io.StringIO()), clean_env():
                os.environ |= {name: value for name, value in variables if name in OF_CLUSTER}
                job = str(executor._submit_command(f"{shlex.join(command)} {file}").job_id)
        except (RuntimeError, OSError) as error:
            why = _reason(str(error))
            keys = (key for word, key in OF_KEYS.items() if word in why.lower())
            place = next((f"{KEY}.{key}" for key in keys if key in self._given), KEY)
            raise ConfigError([(place, f"sbatch refuses: {why}")]) from error
        return [job] if count == 1 else [f"{job}_{n}" for n in range(count)]

    def states(self) -> dict[str, State]:
        """Return the state of each job of this user that Slurm still knows.

        Raises:
            LoraExpError: Slurm does not answer.
        """
        lines = _run(
            "squeue", "--me", f"--name={NAME}", "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%r"
        ).splitlines()
        return {job: _state(*rest) for job, *rest in (line.split("|", 3) for line in lines)}

    def stop(self, ids: Iterable[str], at_once: bool = False) -> None:
        """End jobs; what trains saves a checkpoint at the end of its step, unless `at_once`."""
        options: list[list[str]] = (
            [[]] if at_once else [["--state=PENDING"], ["--state=RUNNING", "--signal=TERM"]]
        )
        jobs = list(ids)
        for each in options if jobs else []:
            with suppress(LoraExpError):  # some have ended by themselves
                _run("scancel", *each, *jobs)

    def earlier(self, folder: Path) -> list[str]:
        """Return an earlier launch's jobs that have not ended; they outlive their launcher."""
        arrays = {path.name.split("_")[0] for path in folder.glob("*/*_submission.sh")}
        states = self.states() if arrays else {}
        ours = (job for job in states if job.split("_")[0] in arrays)
        return [job for job in ours if states[job].in_queue]

    def close(self) -> None:
        """Do nothing: each command of Slurm connects anew."""


def _faults(section: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each value that sbatch would not take."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        text = "slurm: there is no sbatch here; launch the sweep where Slurm's commands are"
        yield "hydra.launcher.executor", text
    time, gpus, memory = (section[key] for key in ("time", "gpus", "memory"))
    if time is not None and not TIME.fullmatch(str(time)):
        yield f"{KEY}.time", f'{time} is no time; give minutes, or a text like "12:00:00"'
    if str(time).isdecimal() and int(time) * 60 <= WARNING_S:
        yield f"{KEY}.time", f"{time}: jobs save {WARNING_S // 60} minutes before it; give more"
    if gpus is not None and not GPUS.fullmatch(str(gpus)):
        yield f"{KEY}.gpus", f"{gpus}: a pack trains on one GPU; give 1, or its type too: a100:1"
    if memory is not None and not MEMORY.fullmatch(str(memory)):
        yield f"{KEY}.memory", f"{memory} is no memory; give a number with its unit, like 32G"
    for key, least in (("cpus", 1), ("retries", 0)):
        if section[key] < least:
            yield f"{KEY}.{key}", f"{section[key]} is too few; give {least} or more"
    text = "holds a secret, and the batch script is a file; export it where you launch"
    values = plain(OmegaConf.create(dict(section)))
    yield from ((f"{KEY}.{key}", text) for key, v in values.items() if redact(v) != v)
    options = section["options"] or {}
    if not isinstance(options, Mapping):
        yield f"{KEY}.options", f"{options} is no dict of sbatch's long options: {{qos: high}}"
        return
    for name in options:
        if name in OF_OURS:
            yield f"{KEY}.options.{name}", f"is set by lora-exp, from a key of {KEY} if it has one"
        elif not OPTION.fullmatch(str(name)):
            yield f"{KEY}.options", f"{name!r} is no long option of sbatch, like qos or constraint"


def _parameters(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return submitit's parameters; what is None is left to Slurm."""
    cpus = section["cpus"]
    setup = [
        f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export {THREADS}=${{{THREADS}:-{cpus}}}",
        *section["setup"],
    ]
    return {
        "job_name": NAME,
        "partition": section["partition"],
        "account": section["account"],
        "time": section["time"],
        "gpus_per_node": section["gpus"] or None,
        "cpus_per_task": cpus,
        "mem": section["memory"],
        "setup": setup,
        "wckey": None,
        # since Slurm 22.05 srun does not inherit the first; one process starts those of all nodes
        "srun_args": [f"--cpus-per-task={cpus}", "--nodes=1", "--ntasks=1"],
        "additional_parameters": {"signal": f"TERM@{WARNING_S}"} | dict(section["options"] or {}),
    }


def _state(name: str, node: str, reason: str) -> State:
    words = name.lower().replace("_", " ")
    if name == "RUNNING":
        return State(True, f"runs on {node}")
    return State(name in IN_QUEUE, f"{words} ({reason})" if reason not in ("", "None") else words)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        text = getattr(error, "stderr", None) or str(error)
        raise LoraExpError(f"{command[0]}: {_reason(text)}") from error
    return done.stdout


def _reason(text: str) -> str:
    """Return the line of Slurm's output that says what is wrong.

    Mostly that is the first error; what follows it are consequences. Without munge or a
    configuration the first ones are advice and attempts.
    """
    found = [re.search(r"(error|fatal):\s+(\S.*)", line) for line in text.splitlines()]
    lines = [(match[1], match[2].strip()) for match in found if match]
    causes = [line for kind, line in lines if kind == "fatal" or line.startswith("Munge ")]
    return next(iter([*causes, *(line for _, line in lines)]), " ".join(text.split()))
