"""Ray as an engine: each submission is a task that runs the command in a process of its own.

Tasks end with the launcher, which is Ray's driver. The package ray is imported when it is needed.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count as numbers
from pathlib import Path
from typing import Any

from lora_exp.config.processes import CUDA, THREADS
from lora_exp.config.ranges import Fault
from lora_exp.errors import ConfigError, ExtraError
from lora_exp.files.redaction import ENVIRONMENT, redact_text
from lora_exp.lockstep.engine import State
from lora_exp.model.processor import PREFIXES
from lora_exp.training.interruption import SIGNALS

log = logging.getLogger(__name__)
KEY = "hydra.launcher.ray"
ROOT = Path(__file__).parents[2]  # the folder of the package: nodes may not have it installed
ADDRESS = re.compile(r"[^\s/]+:\d+")
ANSWER_S = 5  # of the port at an address; Ray itself tries for minutes
OBJECTS_BYTES = 80_000_000  # of a cluster here, which stores none
OWN = ("node:", "memory", "object_store_memory", "accelerator_type:")  # resources that Ray adds
# variables that go along, unless they are secrets: a task's arguments are stored by Ray
SENT = (*PREFIXES, "LORA_EXP_", "HF_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "TRACKIO_")
LOGIN = re.compile(r"://[^/\s]*@")


class Ray:
    """A cluster of which this process is a driver; an `Engine`."""

    name, unit, limit = "ray", "Ray task", sys.maxsize

    def __init__(self, section: Mapping[str, Any]) -> None:
        """Check `hydra.launcher.ray`, and join the cluster, or start one of this machine.

        Raises:
            ConfigError: values that Ray would not take, no cluster at the address, or no node
                that has the resources.
            ExtraError: ray is missing.
        """
        if find_spec("ray") is None:
            raise ExtraError('executor=ray: ray is missing: pip install "lora-exp[ray]"')
        address = section["address"] or os.environ.get("RAY_ADDRESS") or "local"
        if faults := [*_faults(section), *_address_faults(address)]:
            raise ConfigError(faults)
        self.retries = int(section["retries"])
        self._ids, self._logs = numbers(1), dict[str, Path]()
        self._tasks: dict[str, Any] = {}  # that have not ended
        self._states: dict[str, State] = {}  # the latest
        self._asked: set[tuple[str, bool]] = set()  # to end
        self._folder = tempfile.TemporaryDirectory(prefix="ray-")
        try:
            self._join(address)
            self._options = _options(section)
        except ConfigError:
            self.close()
            raise
        if address != "local" and (kept := _secrets()):
            log.warning("secrets stay here: %s; set them where Ray's nodes start", ", ".join(kept))

    def submit(self, command: Sequence[str], folder: Path, count: int) -> list[str]:
        """Submit tasks; see `Engine.submit`."""
        import ray

        environment = _environment(self._options["num_cpus"], self._options["num_gpus"])
        task = ray.remote(max_retries=0, **self._options)(_task())
        ids = [str(next(self._ids)) for _ in range(count)]
        for number, each in enumerate(ids):
            share, self._logs[each] = folder / str(number), folder / f"{number}.log"
            words, log = [*command, str(share)], str(self._logs[each].absolute())
            self._tasks[each] = task.remote(words, str(Path.cwd()), environment, log)
            self._states[each] = State(True, "waits for a node")
        return ids

    def states(self) -> Mapping[str, State]:
        """Return the states of all tasks; the log of one that runs begins with its node."""
        import ray

        ids = {task: each for each, task in self._tasks.items()}
        ended = ray.wait([*ids], num_returns=len(ids), timeout=0)[0] if ids else []
        for task in ended:
            self._states[ids[task]] = State(False, _ending(task))
            del self._tasks[ids[task]]
        for each in self._tasks:
            if self._states[each].text.startswith("waits") and self._logs[each].is_file():
                node = self._logs[each].read_text(errors="replace").partition("\n")[0]
                self._states[each] = State(True, f"runs {node}")
        return self._states

    def stop(self, ids: Iterable[str], at_once: bool = False) -> None:
        """End tasks, each once: Ray tries again by itself until they have heard of it."""
        import ray

        for each in ids:
            if each in self._tasks and (each, at_once) not in self._asked:
                self._asked.add((each, at_once))
                ray.cancel(self._tasks[each], force=at_once)

    def earlier(self, folder: Path) -> list[str]:
        """Return nothing: tasks end with their launcher, and what still saves is waited for."""
        return []

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        import ray

        with _own_handlers():
            ray.shutdown()
        self._folder.cleanup()

    def _join(self, address: str) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings: dict[str, Any] = {}
        if address == "local":
            settings = {"include_dashboard": False, "object_store_memory": OBJECTS_BYTES}
            settings["_system_config"] = {"worker_niceness": 0}  # Ray's is 15
            if "RAY_TMPDIR" not in os.environ:
                settings["_temp_dir"] = self._folder.name
        import ray

        try:
            with _own_handlers():
                ray.init(address, log_to_driver=False, logging_level="ERROR", **settings)
        except (RuntimeError, OSError, ValueError) as error:
            text = " ".join(redact_text(str(error)).split())
            raise ConfigError([(f"{KEY}.address", f"{address}: {text}")]) from error


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's options.

    Raises:
        ConfigError: no node has these resources.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = section["gpus"]
    if gpus is None:
        gpus = int(any(node.get("GPU", 0) >= 1 for node in nodes))
    cpus, own = section["cpus"], dict(section["resources"] or {})
    wanted = {"CPU": cpus, "GPU": gpus, **own}
    if not any(all(node.get(n, 0) >= v for n, v in wanted.items()) for node in nodes):
        have = sorted({_listed(node) for node in nodes})
        text = f"no node has {_listed(wanted)}; there are nodes of {', and of '.join(have)}"
        raise ConfigError([(KEY, text)])
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": own or None}


def _environment(cpus: int, gpus: int) -> dict[str, str]:
    """Return the variables of a task's process; Ray chooses its GPU, if it has one."""
    secrets = _secrets()
    names = (name for name in os.environ if name.startswith(SENT) and name not in secrets)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    sent = {THREADS: str(cpus)} | {name: os.environ[name] for name in names}
    return sent | {"PYTHONPATH": os.pathsep.join(paths)} | ({} if gpus else {CUDA: ""})


def _task() -> Callable[[list[str], str, dict[str, str], str], int]:
    """Return what a Ray worker runs. A nested function: the worker need not find our package."""

    def run(command: list[str], folder: str, environment: dict[str, str], log: str) -> int:
        import os
        import socket
        import subprocess
        import time

        with open(log, "a") as output:  # noqa: PTH123
            print(f"on {socket.gethostname()}", file=output, flush=True)
            process = subprocess.Popen(
                [*command, str(os.getpid())], cwd=folder, env=os.environ | environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            while True:
                try:
                    while (code := process.poll()) is None:
                        time.sleep(0.1)  # `wait` would not notice a cancelled task
                    return code
                except KeyboardInterrupt:  # the launcher has cancelled it
                    process.terminate()

    return run


def _ending(task: Any) -> str:
    """Return in words how a task has ended."""
    import ray

    try:
        return f"ended with exit code {ray.get(task)}"
    except ray.exceptions.RayTaskError as error:
        return f"failed: {redact_text(str(error.cause))}"
    except ray.exceptions.RayError as error:
        return f"failed ({type(error).__name__})"


def _faults(section: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each value that Ray would not take."""
    for key, least in (("cpus", 1), ("retries", 0)):
        if section[key] < least:
            yield f"{KEY}.{key}", f"{section[key]} is too few; give {least} or more"
    if section["gpus"] not in (None, 0, 1):
        yield f"{KEY}.gpus", f"{section['gpus']}: a pack trains on one GPU; give 1, or 0"
    resources = section["resources"] or {}
    if not isinstance(resources, Mapping):
        yield f"{KEY}.resources", f"{resources} is no dict of a node's resources: {{a100: 1}}"
        return
    for name, value in resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            yield f"{KEY}.resources.{name}", "is no resource of your own; give cpus, or gpus"
        elif not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            yield f"{KEY}.resources.{name}", f"{value} is no amount; give a number above 0"


def _address_faults(address: str) -> Iterator[Fault]:
    """Yield a fault if nothing answers at an address."""
    key = f"{KEY}.address"
    if address in ("auto", "local"):
        return
    if not ADDRESS.fullmatch(address):
        text = "is no host:port of a head; launch on a node of the cluster, or by `ray job submit`"
        yield key, f"{redact_text(address)} {text}"
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        yield key, f"no cluster answers at {address}: {error}"


def _listed(resources: Mapping[str, float]) -> str:
    shown = {n: v for n, v in sorted(resources.items()) if v and not n.startswith(OWN)}
    return ", ".join(f"{value:g} {name}" for name, value in shown.items())


def _secrets() -> list[str]:
    """Return the names of variables that would go along, but are secrets."""
    names = (name for name in os.environ if name.startswith(SENT))
    return sorted(name for name in names if _is_secret(name, os.environ[name]))


def _is_secret(name: str, value: str) -> bool:
    shows = LOGIN.search(value) is not None or redact_text(value) != value
    return shows or ENVIRONMENT.search(name) is not None


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the handlers of signals: Ray puts its own in their place."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
