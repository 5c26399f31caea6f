"""How many processes a run has, how they divide a step, and what is refused; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.config import processes
from lora_exp.config.processes import divided, process_count, shares_text, visible
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError

ROWS, PASSES = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "VISIBLE", [])


def of(count: Any, *overrides: str) -> Any:
    return compose("parallel=ddp", f"parallel.processes={count}", *overrides)


def test_visible_gpus_are_those_of_the_variable_or_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "GPUS", tmp_path / "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible() == []  # the driver is not there
    monkeypatch.setattr(processes, "GPUS", tmp_path)
    for name in ("0000:17:00.0", "0000:3d:00.0"):
        (tmp_path / name).mkdir()
    assert visible() == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-ab")
    assert visible() == ["1", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible() == ["0", "1"]


def test_null_is_one_process_for_each_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count(compose()) == 1
    cfg = compose("parallel=ddp")
    assert process_count(cfg) == 1
    assert shares_text(cfg) == "one, for there is no GPU to see; parallel.processes=2 starts two"
    monkeypatch.setattr(processes, "VISIBLE", ["0", "2"])
    assert process_count(compose("parallel=ddp")) == 2
    with pytest.raises(ConfigError, match=r"parallel\.processes: 4 processes need as many GPUs"):
        of(4)


@pytest.mark.parametrize(
    ("count", "rows", "passes", "each", "times"),
    [(2, 16, 1, 8, 1), (4, 2, 8, 2, 2), (4, 6, 2, 3, 1), (6, 9, 4, 3, 2), (3, 4, 3, 4, 1)],
)
def test_processes_divide_passes_first_then_their_rows(
    count: int, rows: int, passes: int, each: int, times: int
) -> None:
    cfg = of(count, f"{ROWS}={rows}", f"{PASSES}={passes}")
    names = (name.partition(".")[2] for name in (ROWS, PASSES))
    assert divided(cfg) == dict(zip(names, (each, times), strict=True))
    assert each * times * count == rows * passes
    assert f"each takes {each * times} of the {rows * passes} rows" in shares_text(cfg)


def test_the_header_says_how_many_threads_each_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "thread_count", lambda: 6)
    assert shares_text(of(2)).endswith("8 of the 16 rows of a step; 3 threads each")
    assert shares_text(of(8)).endswith("; 1 thread each, 8 in all, on 6 CPUs")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert shares_text(of(2)).endswith("; 4 threads each, 8 in all, on 6 CPUs")
    monkeypatch.setattr(processes, "VISIBLE", [str(n) for n in range(8)])
    assert shares_text(of(8)).endswith("2 of the 16 rows of a step")


@pytest.mark.parametrize(
    ("count", "overrides", "message"),
    [
        (3, [], r"3 processes cannot share 16 rows x 1 passes of a step evenly; give a divisor of"),
        (4, [f"{ROWS}=2"], "cannot share 2 rows x 1 passes"),
        (2, ["train.gradient_accumulation_steps=2.0"], r"steps: 2\.0 is not a whole number"),
        (0, [], r"parallel\.processes: 0 is not 1 or more"),
        (1.5, [], r"parallel\.processes: 1\.5 is not 1 or more"),
        (2, ["early_stopping=halving"], "early_stopping: halving compares jobs"),
        (2, ["+train.auto_find_batch_size=true"], "begins again with another batch"),
        (2, ["+parallel.machines=2"], r"parallel\.machines: nothing reads this key"),
    ],
)
def test_what_several_processes_cannot_train_is_refused(
    count: Any, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        of(count, *overrides)


def test_several_processes_are_those_of_an_option() -> None:
    with pytest.raises(ConfigError, match=r"2 processes need an option .*; give parallel=ddp"):
        compose("parallel.processes=2")


def test_rollouts_of_a_fixed_number_of_passes_keep_them() -> None:
    grpo = ["experiment=demo_grpo", f"{ROWS}=8", f"{PASSES}=2"]
    assert divided(of(2, *grpo)) == {ROWS[6:]: 8, PASSES[6:]: 1}
    fixed = "+algorithm.args.steps_per_generation=2"
    assert divided(of(2, *grpo, fixed)) == {ROWS[6:]: 4, PASSES[6:]: 2}


def test_patience_works_in_several_processes() -> None:
    assert of(2, "early_stopping=patience").parallel.processes == 2


def test_one_process_computes_what_a_run_without_them_does() -> None:
    assert fingerprint(of(1)) == fingerprint(compose())
    assert fingerprint(of(2)) != fingerprint(compose())
