"""Jobs as greenlets: when they are served, and in which job errors are raised."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from lora_exp.lockstep.hub import Hub, Request, out_of_memory


class Adder:
    """Answers each number with the number plus one, and records the batches."""

    def __init__(self, fails: Any = lambda numbers: None) -> None:
        self.served: list[tuple[Any, list[int]]] = []
        self.fails = fails

    def serve(self, requests: list[Request]) -> list[int]:
        numbers = [request.payload for request in requests]
        self.served.append((requests[0].batch_key, numbers))
        if error := self.fails(numbers):
            raise error
        return [number + 1 for number in numbers]


def job_asking(hub: Hub, results: dict[int, Any], job: int, *requests: tuple[str, int, int]) -> Any:
    def run() -> None:
        try:
            results[job] = [hub.ask(job, key, 1, priority, n) for key, priority, n in requests]
        except Exception as error:
            results[job] = error

    return run


def test_waiting_requests_are_served_together_forwards_first() -> None:
    server, results = Adder(), {}
    hub = Hub(server, 9, 99)
    hub.run(
        [
            job_asking(hub, results, 0, ("f", 0, 1), ("b", 1, 2)),
            job_asking(hub, results, 1, ("f", 0, 10), ("f", 0, 20), ("b", 1, 30)),
        ]
    )
    assert server.served == [("f", [1, 10]), ("f", [20]), ("b", [2, 30])]
    assert results == {0: [2, 3], 1: [11, 21, 31]}


def test_a_job_waits_for_a_condition_and_is_then_served_with_the_others() -> None:
    server, results = Adder(), {}
    hub = Hub(server, 9, 99)
    reported: list[int] = []

    def waits() -> None:
        hub.wait_for(0, lambda: bool(reported))
        results[0] = hub.ask(0, "f", 1, 0, 10)

    def reports() -> None:
        hub.ask(1, "f", 1, 0, 1)
        reported.append(1)
        results[1] = hub.ask(1, "f", 1, 0, 2)

    hub.run([waits, reports])
    assert server.served == [("f", [1]), ("f", [10, 2])]
    assert results == {0: 11, 1: 3}


def test_a_condition_that_no_job_can_bring_about_ends_the_waiting() -> None:
    server, results = Adder(), {}
    hub = Hub(server, 1, 99)  # the second job begins when the first has ended

    def waits(job: int) -> None:
        hub.wait_for(job, lambda: len(results) > 1)
        results[job] = len(results)

    hub.run([lambda: waits(0), lambda: waits(1)])
    assert results == {0: 0, 1: 1}


def test_the_next_job_begins_when_one_ends_and_the_capacity_is_kept() -> None:
    server, results = Adder(), {}
    hub = Hub(server, 3, 2)
    hub.run([job_asking(hub, results, job, ("f", 0, job)) for job in range(5)])
    assert results == {job: [job + 1] for job in range(5)}
    assert max(len(numbers) for _, numbers in server.served) == 2


def test_an_error_is_raised_in_its_own_job_only() -> None:
    server = Adder(lambda numbers: ValueError("no") if 3 in numbers else None)
    results: dict[int, Any] = {}
    hub = Hub(server, 9, 99)
    hub.run([job_asking(hub, results, job, ("f", 0, job), ("f", 0, 9)) for job in range(5)])
    assert isinstance(results.pop(3), ValueError)
    assert results == {job: [job + 1, 10] for job in (0, 1, 2, 4)}
    assert hub.max_batch is None


def test_too_little_memory_halves_the_batch_size_for_good() -> None:
    out_of_memory_error = MemoryError()
    server, results = Adder(lambda numbers: out_of_memory_error if len(numbers) > 2 else None), {}
    hub = Hub(server, 9, 99)
    hub.run([job_asking(hub, results, job, ("f", 0, job), ("f", 0, 9)) for job in range(6)])
    assert results == {job: [job + 1, 10] for job in range(6)}
    assert hub.max_batch is not None
    assert hub.max_batch <= 2


def test_an_interrupt_reaches_every_job() -> None:
    def interrupted(numbers: list[int]) -> Any:
        raise KeyboardInterrupt

    hub, ended = Hub(Adder(interrupted), 9, 99), []

    def job(n: int) -> Any:
        def run() -> None:
            try:
                hub.ask(n, "f", 1, 0, n)
            except KeyboardInterrupt:
                ended.append(n)
                raise

        return run

    with pytest.raises(KeyboardInterrupt):
        hub.run([job(0), job(1)])
    assert ended == [0, 1]


def test_each_job_has_its_own_random_numbers_and_modes() -> None:
    def draw() -> tuple[float, float]:
        return torch.rand(1).item(), random.random()

    def alone(seed: int) -> list[tuple[float, float]]:
        torch.manual_seed(seed)
        random.seed(seed)
        return [draw(), draw()]

    hub, draws = Hub(Adder(), 9, 99), {}

    def job(seed: int) -> Any:
        def run() -> None:
            torch.manual_seed(seed)
            random.seed(seed)
            first = draw()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=seed == 1):
                hub.ask(seed, "f", 1, 0, 0)
                assert not torch.is_grad_enabled()
                assert torch.is_autocast_enabled("cpu") is (seed == 1)
            assert torch.is_grad_enabled()
            draws[seed] = [first, draw()]

        return run

    hub.run([job(0), job(1)])
    assert draws == {0: alone(0), 1: alone(1)}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_out_of_memory_is_recognised_by_its_message(error: BaseException, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_each_job_has_its_own_share_of_the_time_by_the_size_of_its_requests() -> None:
    class Slow(Adder):
        def serve(self, requests: list[Request]) -> list[int]:
            time.sleep(0.06)
            return super().serve(requests)

    hub, shares = Hub(Slow(), 9, 99), {}

    def job(number: int, size: int, own: float) -> Any:
        def run() -> None:
            began = hub.seconds(number)
            time.sleep(own)
            hub.ask(number, "f", size, 0, 1)
            shares[number] = hub.seconds(number) - began

        return run

    began = time.perf_counter()
    hub.run([job(0, 1, 0.0), job(1, 2, 0.03)])
    seconds = time.perf_counter() - began
    assert shares[0] == pytest.approx(0.02, abs=0.015)  # of what was served, a third
    assert shares[1] == pytest.approx(0.07, abs=0.015)
    assert sum(shares.values()) == pytest.approx(seconds, abs=0.01)
