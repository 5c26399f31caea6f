"""How a plan's jobs are dealt out to workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.lockstep import work as work_file
from lora_exp.lockstep.plan import Job
from lora_exp.lockstep.work import Work, costs_of, dealt, rows, together


@pytest.fixture(scope="module")
def configs() -> dict[int, Any]:
    return {steps: compose(f"train.max_steps={steps}") for steps in (10, 90)}


def jobs(configs: dict[int, Any], *numbers: int, steps: int = 10) -> list[Job]:
    cfg = configs[steps]
    return [Job(n, cfg, cfg, Path(str(n)), (f"seed={n}", "a=1")) for n in numbers]


def numbers(work: list[Work]) -> list[list[int]]:
    return [[job.number for job in part.jobs] for part in work]


def test_one_worker_gets_whole_packs_then_the_jobs_alone(configs: dict[int, Any]) -> None:
    packs = [jobs(configs, 0, 1, 2, 3, 4), jobs(configs, 5, 6)]
    work = dealt(packs, jobs(configs, 7, 8), {})
    assert numbers(work) == [[0, 1, 2, 3, 4], [5, 6], [7, 8]]
    assert [part.memory_share for part in work] == [1, 1, 1]
    assert work[1].names == ("seed=5", "seed=6")


def test_a_large_pack_is_halved_and_the_longest_work_comes_first(
    configs: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_file, "memory_share", lambda workers: 1 / workers)
    long = jobs(configs, 11, steps=90)
    work = dealt([jobs(configs, *range(8))], long, {}, workers=2)
    assert numbers(work) == [[11], list(range(8))]  # eight short jobs, and one that takes longer
    packs = [jobs(configs, *range(9)), jobs(configs, 9, 10)]
    work = dealt(packs, [], {}, workers=2)
    assert sorted(map(len, numbers(work))) == [2, 4, 5]
    assert sorted(n for part in numbers(work) for n in part) == list(range(11))
    assert all(part == sorted(part) for part in numbers(work))
    assert {part.memory_share for part in work} == {0.5}
    assert numbers(dealt(packs, [], {}, workers=2)) == numbers(work)


def test_without_a_number_of_workers_each_pack_and_each_job_alone_has_its_own(
    configs: dict[int, Any],
) -> None:
    packs = [jobs(configs, *range(9)), jobs(configs, 9, 10)]
    work = dealt(packs, jobs(configs, 11, 12), {}, workers=None)
    assert numbers(work) == [list(range(9)), [9, 10], [11], [12]]
    assert [part.mode for part in work] == ["exact", "exact", None, None]
    assert {part.memory_share for part in work} == {1.0}


def test_a_pack_of_three_is_not_halved(configs: dict[int, Any]) -> None:
    assert numbers(dealt([jobs(configs, 0, 1, 2)], [], {}, workers=4)) == [[0, 1, 2]]


def test_names_tell_a_job_from_those_of_other_workers(configs: dict[int, Any]) -> None:
    work = dealt([jobs(configs, *range(4))], [], {}, workers=4)
    assert sorted(name for part in work for name in part.names) == [f"seed={n}" for n in range(4)]


def test_rows_are_counted_by_steps_or_epochs(configs: dict[int, Any]) -> None:
    assert rows(jobs(configs, 0)[0]) == 10 * 16
    cfg = compose("train.num_train_epochs=2", "train.per_device_train_batch_size=4")
    assert rows(Job(0, cfg, cfg, Path("0"))) == 2 * 1000


def test_dealing_out_reads_each_job_once_however_many_workers_there_are(
    configs: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(work_file, "rows", lambda job: read.append(job.number) or 1.0)
    work = dealt([jobs(configs, *range(600))], [], {}, workers=100)
    assert sorted(read) == list(range(600))
    assert max(map(len, numbers(work))) <= 7


def test_dealing_out_composes_no_config(configs: dict[int, Any]) -> None:
    composed: list[int] = []
    each = (lambda n=n: composed.append(n) for n in range(4))
    pack = [Job(n, compose, configs[10], Path(str(n))) for n, compose in enumerate(each)]  # type: ignore[arg-type]
    assert len(dealt([pack], [], {}, workers=2)) == 2
    assert composed == []


def of_base(number: int, path: Path | str) -> Job:
    cfg = compose("model=local", f"model.path={path}", "train.max_steps=10")
    return Job(number, cfg, cfg, Path(str(number)), (f"seed={number}",))


def test_a_row_costs_more_on_a_larger_base(tmp_path: Path) -> None:
    for name, count in (("small", 10), ("large", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b" " * count)
    packs = [
        [of_base(n, tmp_path / name) for n in range(first, first + count)]
        for name, first, count in (("small", 0, 3), ("large", 3, 2))
    ]
    costs = costs_of([job for pack in packs for job in pack])
    assert costs == dict.fromkeys((0, 1, 2), 1600.0) | dict.fromkeys((3, 4), 4800.0)
    assert numbers(dealt(packs, [], {}, workers=2)) == [[3, 4], [0, 1, 2]]
    unknown = [*packs[0], of_base(5, "some/model"), *packs[1]]
    assert set(costs_of(unknown).values()) == {160.0}


def test_a_pack_may_begin_with_a_job_that_is_refused_on_this_machine() -> None:
    cfg = compose("lockstep.verify=0.5")
    refused = Job(0, cfg, None, Path("0"))
    assert together([refused], {}, {0: "a"}).verify == 0.5
    assert together([refused, Job(1, cfg, cfg, Path("1"))], {}, {0: "a", 1: "b"}).verify == 0.5
