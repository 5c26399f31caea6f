"""Work in several processes: the results of one, in its order, and a clear end if one is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lora_exp.data.processes import THREADS, in_processes
from lora_exp.errors import DataError


def test_results_come_in_order_from_processes_without_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(THREADS, raising=False)

    def work(part: int) -> tuple[int, int, str | None]:
        return part**2, os.getpid(), os.environ.get(THREADS)

    results = list(in_processes(work, range(20), 2))
    assert [square for square, _, _ in results] == [part**2 for part in range(20)]
    processes = {process for _, process, _ in results}
    assert len(processes) <= 2
    assert os.getpid() not in processes
    assert {threads for _, _, threads in results} == {"false"}
    assert THREADS not in os.environ
    assert list(in_processes(work, [3], 2)) == [(9, os.getpid(), None)]  # there is one part


def test_an_error_in_a_process_is_raised() -> None:
    def work(part: int) -> int:
        raise DataError(f"part {part}")

    with pytest.raises(DataError, match="part 0"):
        list(in_processes(work, range(3), 2))


def test_a_killed_process_is_an_error_with_the_key_to_change() -> None:
    def work(part: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match=r"was killed.*lower data\.num_proc"):
        list(in_processes(work, range(3), 2))


def test_processes_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    def work(part: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)

    run = os.fork()
    if run == 0:
        list(in_processes(work, range(1000), 2))
    until = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 2
    while any(map(is_alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
