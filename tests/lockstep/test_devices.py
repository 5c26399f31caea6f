"""How many workers a launch has, and where each of them computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hydra.errors import MissingConfigException

from hydra_plugins.lockstep_launcher._composition import in_processes
from lora_exp.config import processes
from lora_exp.errors import ConfigError
from lora_exp.lockstep import devices
from lora_exp.lockstep.devices import environments, memory_share, one_worker, where


def test_without_a_gpu_there_is_one_worker_and_more_share_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "VISIBLE", [])
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments(None) == [{}]
    assert [e["OMP_NUM_THREADS"] for e in environments(3)] == ["2"] * 3
    assert [e["OMP_NUM_THREADS"] for e in environments(9)] == ["1"] * 9
    assert memory_share(4) == 0.25
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # threads of each process, as everywhere
    assert [e["OMP_NUM_THREADS"] for e in environments(2)] == ["4"] * 2
    ((jobs, text),) = where([0, 1], environments(2))
    assert (jobs, text.split(": ")[1]) == ([0, 1], "bit for bit as runs with OMP_NUM_THREADS=4")
    assert where([0, 1], environments(1)) == []


def test_each_gpu_has_a_worker_and_no_gpu_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "VISIBLE", ["0", "3"])
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(None)] == ["0", "3"]
    assert environments(1) == [{}]
    assert memory_share(2) == 1
    with pytest.raises(ConfigError, match=r"workers: 3 workers need as many GPUs.*has 2"):
        environments(3)
    with pytest.raises(ConfigError, match="0 is not above 0"):
        environments(0)


def test_jobs_in_processes_of_their_own_need_the_only_worker() -> None:
    assert one_worker(None, needed=True) == 1
    assert one_worker(1, needed=True) == 1
    assert one_worker(3, needed=False) == 3
    with pytest.raises(ConfigError, match=r"workers: 2, but jobs of several processes take all"):
        one_worker(2, needed=True)


def test_a_preset_may_train_its_jobs_in_processes_of_their_own() -> None:
    def load(config: SimpleNamespace, words: list[str]) -> SimpleNamespace:
        if words == ["experiment=none_such"]:
            raise MissingConfigException("no such preset")
        count = 2 if "experiment=two" in words else 1
        return SimpleNamespace(parallel=SimpleNamespace(processes=count))

    loader = SimpleNamespace(composed=load)
    launcher = SimpleNamespace(
        config=load(SimpleNamespace(), []), hydra_context=SimpleNamespace(config_loader=loader)
    )
    assert not in_processes(launcher, [["seed=1"], ["experiment=one"], ["experiment=none_such"]])
    assert in_processes(launcher, [["experiment=one"], ["experiment=two", "seed=1"]])
    assert in_processes(launcher, [["seed=1"], ["parallel.processes=2"]])


def test_a_system_that_tells_no_affinity_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(processes.os, "sched_getaffinity")
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 10)
    assert processes.thread_count() == 10
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes.threads_each(3) == "3"
