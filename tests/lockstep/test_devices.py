"""How many workers a launch has, and where each of them computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.errors import ConfigError
from lora_exp.lockstep import devices
from lora_exp.lockstep.devices import environments, memory_share, visible, where


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
    assert (jobs, text.split(": ")[1]) == ([0, 1], "bits as of runs with OMP_NUM_THREADS=4")
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


def test_visible_gpus_are_those_of_the_variable_or_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "GPUS", tmp_path / "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible() == []  # the driver is not there
    monkeypatch.setattr(devices, "GPUS", tmp_path)
    for name in ("0000:17:00.0", "0000:3d:00.0"):
        (tmp_path / name).mkdir()
    assert visible() == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-ab")
    assert visible() == ["1", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible() == ["0", "1"]
