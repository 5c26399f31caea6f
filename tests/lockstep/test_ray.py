"""A sweep on a real Ray cluster of two nodes, and what is refused before one is joined."""

from __future__ import annotations

import _thread
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.lockstep_launcher.config import RayConfig
from lora_exp.errors import ConfigError, ExtraError
from lora_exp.lockstep import ray
from lora_exp.lockstep.cluster import PROGRAM
from lora_exp.lockstep.ray import Ray, _environment, _own_handlers, _secrets, _task
from tests.lockstep.test_cluster import SWEEP, adapters
from tests.ray_nodes import two_nodes
from tests.test_main import cli
from tests.warm import Process

TASKS = ["hydra.launcher.executor=ray", "hydra.launcher.workers=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, int]]:
    """Run a cluster that all commands join; yields its folder, and its second node's process."""
    if find_spec("ray") is None:
        pytest.skip('Ray is not installed: pip install "lora-exp[ray]"')
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        two_nodes(Path(folder)) as (address, second),
    ):
        patch.setenv("RAY_ADDRESS", address)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Path(folder), second


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapters of the same sweep, trained by the local executor."""
    folder = tmp_path_factory.mktemp("here")
    assert cli(*SWEEP, cwd=folder).returncode == 0
    return adapters(folder)


def processes(folder: Path) -> dict[str, int]:
    """Return the processes that do shares of sweeps launched in a folder, by the share."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if PROGRAM in words and (process / "cwd").readlink() == folder:
                found[words[-3]] = int(process.name)
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])


def launched(folder: Path, *arguments: str) -> tuple[Process, Callable[[], str]]:
    """Launch a sweep; return its process, and a function that reads its output."""
    with (folder / "out").open("a") as output:
        process = Process("-m", "lora_exp", *arguments, cwd=folder, stdout=output, stderr=output)
    return process, (folder / "out").read_text


def wait(process: Process, output: Callable[[], str], condition: Callable[[], Any]) -> Any:
    """Wait until something is true, while a command runs."""
    while not (value := condition()):
        assert process.poll() is None, output()
        time.sleep(0.02)
    return value


def test_a_sweep_ends_with_the_same_bytes_though_a_node_is_killed(
    cluster: tuple[Path, int], here: dict[str, bytes], tmp_path: Path
) -> None:
    _, node = cluster
    process, output = launched(tmp_path, *SWEEP, *TASKS)
    sweep = tmp_path / "a/b"
    wait(process, output, lambda: len(processes(tmp_path)) == 2)
    ((share, child),) = (
        (share, child)
        for share, child in processes(tmp_path).items()
        if parent(parent(child)) == node
    )
    jobs = list(json.loads((tmp_path / f"{share}.json").read_text())["jobs"])
    wait(process, output, lambda: list(sweep.glob(f"{jobs[0]}/checkpoints/checkpoint-*")))
    for each in (node, parent(child), child):
        os.kill(each, signal.SIGKILL)
    assert process.wait() == 0, output()
    assert f"has ended before jobs {', '.join(jobs)}: sent again" in output()
    records = [json.loads((sweep / job / "run.json").read_text()) for job in jobs]
    assert [record["resumed"][0]["status"] for record in records] == ["running"] * 2
    rows = json.loads((sweep / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert adapters(tmp_path) == here
    assert len(here) == 4


def test_a_signal_stops_all_tasks_and_the_sweep_can_be_completed_here(
    cluster: tuple[Path, int],
    here: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canary = "a-secret-of-the-launcher"
    monkeypatch.setenv("HF_TOKEN", canary)
    process, output = launched(tmp_path, *SWEEP, *TASKS[:1])
    wait(process, output, lambda: list(tmp_path.glob("a/b/0/checkpoints/checkpoint-*")))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, output()
    assert not processes(tmp_path)
    assert "secrets stay here: HF_TOKEN; set them where" in output()
    files = [p for top in (tmp_path, cluster[0]) for p in top.rglob("*") if p.is_file()]
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    records = map(Path.read_text, tmp_path.glob("a/b/*/run.json"))
    statuses = [json.loads(record)["status"] for record in records]
    assert statuses == ["interrupted"] * 4
    done = cli("resume=a/b", "hydra.launcher.executor=local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert adapters(tmp_path) == here


def test_resources_that_no_node_has_are_one_line(cluster: tuple[Path, int], tmp_path: Path) -> None:
    wanted = ["hydra.launcher.ray.cpus=64", "+hydra.launcher.ray.resources.a100=1"]
    done = cli(*SWEEP, *TASKS, *wanted, cwd=tmp_path)
    text = "hydra.launcher.ray: no node has 64 CPU, 1 a100; there are nodes of 1 CPU"
    assert (done.returncode, done.stderr) == (1, f"ConfigError: {text}\n")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["multirun.yaml"]  # Hydra's


def test_a_task_starts_the_command_with_its_own_process_as_parent(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['A'], os.getcwd(), sys.argv[1]); sys.exit(75)"
    log = tmp_path / "log"
    assert _task()([sys.executable, "-c", code], str(tmp_path), {"A": "b"}, str(log)) == 75
    lines = [f"on {socket.gethostname()}", f"b {tmp_path} {os.getpid()}"]
    assert log.read_text().splitlines() == lines


def test_a_task_that_is_cancelled_asks_its_process_to_stop_and_waits(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, lambda *_: exit(75)); print(1, flush=True)"
    command, log = [sys.executable, "-c", f"{code}; time.sleep(60)"], tmp_path / "log"

    def cancel() -> None:
        while not log.is_file() or "1\n" not in log.read_text():
            time.sleep(0.01)
        _thread.interrupt_main()  # as Ray does

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a Ray worker
    try:
        threading.Thread(target=cancel).start()
        assert _task()(command, str(tmp_path), {}, str(log)) == 75
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"cpus": 0}, "cpus: 0 is too few; give 1 or more"),
        ({"retries": -1}, "retries: -1 is too few; give 0 or more"),
        ({"gpus": 4}, "gpus: 4: a pack trains on one GPU; give 1, or 0"),
        ({"resources": "a100"}, "resources: a100 is no dict of a node's resources: {a100: 1}"),
        ({"resources": {"GPU": 1}}, "resources.GPU: is no resource of your own; give cpus, or gpu"),
        ({"resources": {"a100": 0}}, "resources.a100: 0 is no amount; give a number above 0"),
        ({"address": "ray://head:10001"}, "address: ray://head:10001 is no host:port of a head; l"),
    ],
)
def test_a_value_that_ray_would_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], fault: str
) -> None:
    monkeypatch.setattr(ray, "find_spec", lambda name: True)
    with pytest.raises(ConfigError) as error:
        Ray(asdict(RayConfig(**values)))
    assert str(error.value).startswith(f"hydra.launcher.ray.{fault}")


def test_an_address_without_a_cluster_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "find_spec", lambda name: True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"no cluster answers at {address}: .*refused"):
            Ray(asdict(RayConfig()))


def test_a_machine_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r'pip install "lora-exp\[ray\]"'):
        Ray(asdict(RayConfig()))


def test_secrets_and_other_variables_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    kept = {"HF_TOKEN": "canary-1", "WANDB_API_KEY": "canary-2", "WANDB_NOTES": f"hf_{'a' * 34}"}
    kept |= {"MLFLOW_TRACKING_URI": "https://me:canary-3@host"}
    sent = {"WANDB_PROJECT": "p", "OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1"}
    for name, value in {**kept, **sent, "HOME": "/root", "PYTHONPATH": "a"}.items():
        monkeypatch.setenv(name, value)
    expected = sent | {"PYTHONPATH": f"{ray.ROOT}:a", "CUDA_VISIBLE_DEVICES": ""}
    assert _environment(4, 0) == expected
    assert "CUDA_VISIBLE_DEVICES" not in _environment(4, 1)
    assert _secrets() == sorted(kept)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _environment(4, 1)["OMP_NUM_THREADS"] == "4"


def test_the_handlers_of_signals_stay_ours() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _own_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("executor", "key", "value", "default"),
    [("ray", "slurm.partition", "gpu", "null"), ("slurm", "ray.cpus", "2", "1")],
)
def test_keys_of_another_executor_are_refused(
    tmp_path: Path, executor: str, key: str, value: str, default: str
) -> None:
    settings = [f"hydra.launcher.executor={executor}", f"hydra.launcher.{key}={value}"]
    done = cli(*SWEEP, *settings, cwd=tmp_path)
    text = f"belongs to executor={key.partition('.')[0]}, and this is {executor}"
    text = f"hydra.launcher.{key}: {text}; leave it out, or give {default}"
    assert (done.returncode, done.stderr) == (1, f"ConfigError: {text}\n")
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["multirun.yaml"]  # Hydra's
