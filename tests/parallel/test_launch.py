"""Runs in two processes: their bytes, signals, kills, refusals. One command is not forked."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_exp import compose, run
from lora_exp.errors import ConfigError, DivergedError, Interrupted, LoraExpError
from lora_exp.parallel import launch
from lora_exp.parallel.launch import LOST, STOPPED, Processes, check_single_process, environment
from lora_exp.training.manifest import checkpoints_by_step
from tests.algorithm.test_algorithms import overrides_for
from tests.conftest import QUICK, ROOT, in_fast_dtype
from tests.test_experiment import digest
from tests.training.test_interruption import count_lines, status_of, wait_for
from tests.warm import Process, python

RUN = ["tracking=none", *QUICK, "train.max_steps=12"]
RUN += ["train.logging_steps=1", "samples.rows=2", "train.eval_strategy=no"]
# 16 held-out rows in batches of 5: four, of which the last has one row
RUN += ["train.per_device_eval_batch_size=5", "train.save_strategy=steps", "train.save_steps=4"]
TWO = ["parallel=ddp", "parallel.processes=2"]


def start(folder: Path, *overrides: str) -> Process:
    return Process("-m", "tests.parallel.forked", *overrides, cwd=folder, new_session=True)


def second_of(process: Process) -> int:
    """Return the id of the second process of a command's run: the youngest child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return max(map(int, children))


def killed_stopped_and_resumed(folder: Path, *options: str) -> str:
    """Kill a process of a run, stop the resumed run, resume it; return what the last one prints."""
    run = folder / "run"
    killed = start(folder, *options, "hydra.run.dir=run")
    wait_for(killed, lambda: count_lines(run / "metrics.jsonl") >= 6)
    os.kill(second_of(killed), signal.SIGKILL)
    assert "process 1 of 2 was killed by SIGKILL" in killed.communicate(timeout=60)[1]
    stopped = start(folder, "resume=run")
    wait_for(stopped, lambda: count_lines(run / "metrics.jsonl") >= 7)
    os.kill(second_of(stopped), signal.SIGTERM)
    errors = stopped.communicate(timeout=60)[1]
    assert (stopped.returncode, status_of(run)) == (STOPPED, "interrupted"), errors
    last = max(checkpoints_by_step(run / "checkpoints"))
    assert 3 <= last < 12
    done = python("-m", "tests.parallel.forked", "resume=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {last}\n" in done.stdout
    return str(done.stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two processes, without interruption."""
    folder = tmp_path_factory.mktemp("two")
    done = python("-m", "tests.parallel.forked", *RUN, *TWO, "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    # set too late for a process that has torch already: TORCH_CPP_LOG_LEVEL
    assert [x for x in done.stderr.splitlines() if "find_unused_parameters" not in x] == []
    assert "processes     2, each takes 2 of the 4 rows of a step" in done.stdout
    assert done.stdout.count("step 12/12") == 1
    return folder / "run"


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors").values()
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_two_processes_train_what_one_does(whole: Path, tmp_path: Path) -> None:
    alone = run(compose(*RUN), tmp_path / "alone")
    record = json.loads((whole / "run.json").read_text())
    assert record["processes"] == 2
    assert record["choices"]["parallel"] == "ddp"
    assert record["status"] == "finished"
    one, two = weights(tmp_path / "alone/adapter"), weights(whole / "adapter")
    assert (one - two).abs().max() < 5e-3 * one.abs().max()  # after 12 steps of Adam
    assert not torch.equal(one, two)
    for name in ("before/loss", "eval/loss", "eval/mean_token_accuracy", "train/loss"):
        assert record["metrics"][name] == pytest.approx(alone.metrics[name], rel=1e-5)
    # before training the weights are the same, and so is each batch of the evaluation
    assert record["metrics"]["before/loss"] == alone.metrics["before/loss"]
    losses = [
        [row.get("train/loss") for row in map(json.loads, path.read_text().splitlines())]
        for path in (whole / "metrics.jsonl", tmp_path / "alone/metrics.jsonl")
    ]
    assert len(losses[0]) == len(losses[1])


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_each_process_has_the_whole_quantised_base(tmp_path: Path, quant: str) -> None:
    options = [*(o for o in RUN if "max_steps" not in o), *in_fast_dtype(f"quant={quant}")]
    options += ["train.max_steps=4"]
    command = [*options, *TWO, "hydra.run.dir=two"]
    done = python("-m", "tests.parallel.forked", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = run(compose(*options), tmp_path / "one")
    record = json.loads((tmp_path / "two/run.json").read_text())
    assert record["metrics"]["before/loss"] == alone.metrics["before/loss"]  # the same base
    assert record["metrics"]["train/loss"] == pytest.approx(alone.metrics["train/loss"], rel=1e-2)
    one, two = (weights(tmp_path / name / "adapter") for name in ("one", "two"))
    assert not torch.equal(one, two)
    assert (one - two).norm() < 0.02 * one.norm()  # products are rounded to bfloat16


def test_killed_and_stopped_it_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed = start(tmp_path, *RUN, *TWO, "hydra.run.dir=run")
    wait_for(killed, lambda: count_lines(folder / "metrics.jsonl") >= 6)
    os.kill(second_of(killed), signal.SIGKILL)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == 1
    assert errors.endswith(
        "\nLoraExpError: process 1 of 2 was killed by SIGKILL (is memory short?)\n"
    )
    assert status_of(folder) == "failed"

    stopped = start(tmp_path, "resume=run")
    wait_for(stopped, lambda: count_lines(folder / "metrics.jsonl") >= 7)
    os.kill(second_of(stopped), signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == STOPPED, errors
    assert status_of(folder) == "interrupted"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert max(checkpoints_by_step(folder / "checkpoints")) == last

    done = python("-m", "tests.parallel.forked", "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {last}\n" in done.stdout
    assert 4 <= last < 12
    assert digest(folder / "adapter") == digest(whole / "adapter")
    assert not [path for path in (folder / "checkpoints").iterdir() if "staged" in path.name]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_killed_and_stopped_within_a_rollout_it_resumes_bit_for_bit(
    tmp_path: Path, algorithm: str
) -> None:
    options = [*overrides_for(algorithm), *TWO, "train.max_steps=12", "train.logging_steps=1"]
    options += ["train.save_strategy=steps", "train.save_steps=3", "train.eval_strategy=no"]
    if algorithm == "grpo":
        options.append("+algorithm.args.num_iterations=2")  # of ppo four steps are of one rollout
    done = python("-m", "tests.parallel.forked", *options, "hydra.run.dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "whole/checkpoints/checkpoint-9"
    assert len([*saved.glob("rollout*")]) == 2  # of each process
    killed_stopped_and_resumed(tmp_path, *options)
    assert digest(tmp_path / "run/adapter") == digest(tmp_path / "whole/adapter")


def test_another_number_of_processes_is_refused_on_resume(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.processes: 4, but the run was started with"):
        compose(f"resume={whole}", "parallel.processes=4")
    assert compose(f"resume={whole}").parallel.processes == 2


def test_an_error_of_all_processes_is_printed_once(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    command = [*RUN, *TWO, "data=jsonl", f"data.path={rows}", "hydra.run.dir=run"]
    command = [o for o in command if not o.startswith("data.max")]
    done = python(
        str(ROOT / "run.py"), *command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("DataError: ")
    assert done.stderr.count("shape completion") == 1
    assert "Traceback" not in done.stderr


def ended(tmp_path: Path, codes: list[int | None], *results: dict[str, Any]) -> BaseException:
    """Return the cause that is found for some exit codes and reports."""
    processes = Processes(len(codes), tmp_path)
    for rank, result in enumerate(results):
        (tmp_path / launch.RESULT.format(rank)).write_text(json.dumps(result))
    return processes._error(codes)


def test_the_cause_is_no_other_ends_consequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lora_exp")
    lost = {"kind": LOST, "text": "Connection closed by peer"}
    assert str(ended(tmp_path, [1, -9], lost)).startswith("process 1 of 2 was killed by SIGKILL")
    assert isinstance(ended(tmp_path, [1, -15], lost), Interrupted)
    assert isinstance(ended(tmp_path, [STOPPED, None], {}), Interrupted)
    memory = {"text": "OutOfMemoryError: 3 GiB", "traceback": "in the second process"}
    error = ended(tmp_path, [1, 1], lost, memory)
    assert caplog.messages == ["process 1 of 2: in the second process"]
    assert (type(error), str(error)) == (LoraExpError, "process 1 of 2: OutOfMemoryError: 3 GiB")
    error = ended(tmp_path, [1, 1], {"kind": "DivergedError", "text": "loss is nan"}, lost)
    assert (type(error), str(error)) == (DivergedError, "loss is nan")
    error = ended(tmp_path, [1, None], {"kind": "ConfigError", "faults": [["a.b", "is not c"]]})
    assert isinstance(error, ConfigError)
    assert error.faults == [("a.b", "is not c")]
    (tmp_path / launch.RESULT.format(0)).unlink()
    assert str(ended(tmp_path, [3, None])) == "process 0 of 2: ended with exit code 3"


def test_processes_of_other_launchers_are_told_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.raises(ConfigError, match=r"type parallel=ddp parallel\.processes=3"):
        check_single_process()


def test_processes_share_the_threads_or_see_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "VISIBLE", [])
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setattr(sys, "path", ["", "/x"])
    values = environment(1, 2, 2)
    assert (values["RANK"], values["WORLD_SIZE"], values["OMP_NUM_THREADS"]) == ("1", "2", "4")
    assert values["PYTHONPATH"] == f"{Path.cwd()}:/x"
    monkeypatch.setattr(launch, "VISIBLE", ["2", "5", "7"])
    values = environment(1, 2, 2)
    assert values["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert "OMP_NUM_THREADS" not in values
