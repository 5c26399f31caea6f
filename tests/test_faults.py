"""Injected faults: kill -9, a full disk, no memory, a second process.

scripts/faults repeats these tests a hundred times; docs/reliability.md has the whole list.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lora_exp import compose, run
from lora_exp.errors import AdapterError
from lora_exp.files.paths import asset
from tests.conftest import QUICK
from tests.files.test_whole import run_on_a_small_disk
from tests.test_experiment import digest
from tests.test_main import cli
from tests.training.test_interruption import (
    count_lines,
    interrupt_twice,
    start,
    status_of,
    wait_for,
)
from tests.warm import python

SETTINGS = ["tracking=none", *QUICK, "train.max_steps=60", "train.save_strategy=steps"]
SETTINGS += ["train.save_steps=5", "train.logging_steps=1", "train.per_device_train_batch_size=4"]
SETTINGS += ["peft.lora_dropout=0.1", "train.eval_strategy=no", "samples.rows=0"]
RUN = [*SETTINGS, "hydra.run.dir=run"]


def kill(folder: Path, command: list[str], rng: random.Random, saving: bool) -> bool:
    """Run a command and kill -9 it while it saves or trains; return whether it was saving."""
    process = start(folder, *command)
    log, checkpoints = folder / "run/metrics.jsonl", folder / "run/checkpoints"
    steps = rng.randrange(1, 58)
    wait_for(process, lambda: count_lines(log) > steps)
    if saving:
        wait_for(process, lambda: any(checkpoints.glob(".staged-*")))
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert status_of(folder / "run") == "running"
    return any(checkpoints.glob(".staged-*"))


def kill_and_resume(folder: Path, number: int, uninterrupted: dict[str, str]) -> tuple[bool, bool]:
    """Kill a run once and resume it.

    Returns:
        Whether its adapter equals an uninterrupted run's, and whether it was killed in a save.
    """
    folder.mkdir(parents=True)
    in_a_save = kill(folder, RUN, random.Random(number), saving=number % 2 == 0)
    done = cli("resume=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return digest(folder / "run/adapter") == uninterrupted, in_a_save


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digest(run(compose(*SETTINGS), tmp_path_factory.mktemp("uninterrupted")).saved)


@pytest.mark.parametrize("number", range(2))  # in a save and in a step; scripts/faults has more
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    number: int, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    same, _ = kill_and_resume(tmp_path / "killed", number, uninterrupted)
    assert same


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_works(
    uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    run = f"{sys.executable} -m lora_exp"
    settings = " ".join(RUN).replace("hydra.run.dir=run", "hydra.run.dir=disk/run")
    script = f"""
        (while [ ! -d disk/run/checkpoints/checkpoint-10 ]; do sleep 0.01; done
         head -c 40M /dev/zero > disk/ballast) 2>/dev/null &
        {run} {settings}; echo "exit $?"; ls -A disk/run/checkpoints; cat disk/run/run.json
        rm disk/ballast
        {run} resume=disk/run && cp -r disk/run/adapter .
    """
    done = run_on_a_small_disk(tmp_path, script, "24m")
    output = done.stdout + done.stderr
    assert "exit 1" in output
    assert "No space left on device" in output
    assert "make room" in output
    assert "Traceback" not in output
    assert ".staged" not in output
    assert digest(tmp_path / "adapter") == uninterrupted, output


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    first = start(tmp_path, *RUN, "train.max_steps=30")
    wait_for(first, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 1)
    first.send_signal(signal.SIGSTOP)  # so that it still runs when the second starts
    for command in (["resume=run"], RUN):
        second = cli(*command, cwd=tmp_path)
        assert second.returncode == 1
        assert "Traceback" not in second.stderr
        message = "holds a run already" if command is RUN else f"in use by process {first.pid} on"
        assert message in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert first.communicate()[1] == ""
    assert status_of(tmp_path / "run") == "finished"


OUT_OF_MEMORY = """
import json, os, resource, sys
from pathlib import Path
from lora_exp import compose, run

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

overrides = json.loads(sys.argv[1])
run(compose(*overrides, "seed=7"), "warm")  # fills caches that stay in memory
environment, before = dict(os.environ), resident()
for number in range(3):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 96 * 2**20, -1))
    try:
        run(compose(*overrides, "train.per_device_train_batch_size=64"), f"large{number}")
        sys.exit("it had enough memory")
    except (MemoryError, RuntimeError) as error:
        print("failed:", type(error).__name__, str(error)[:60])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert dict(os.environ) == environment
run(compose(*overrides), "after")
print("grown by MiB:", (resident() - before) // 2**20)
"""


def test_after_three_jobs_without_memory_a_run_equals_one_in_a_fresh_process(
    tmp_path: Path,
) -> None:
    overrides = [override for override in RUN if not override.startswith("hydra.")]
    overrides += ["train.max_steps=3", "algorithm.args.packing=false"]
    done = python("-c", OUT_OF_MEMORY, json.dumps(overrides), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("failed:") == 3, done.stdout
    (grown,) = (line for line in done.stdout.splitlines() if line.startswith("grown"))
    assert int(grown.rpartition(" ")[2]) < 100
    assert [status_of(tmp_path / f"large{n}") for n in range(3)] == ["failed"] * 3
    fresh = cli(*overrides, "hydra.run.dir=fresh", cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    assert digest(tmp_path / "after/adapter") == digest(tmp_path / "fresh/adapter")


def test_a_pickle_for_an_adapter_is_never_executed(tmp_path: Path) -> None:
    import pickle

    from tests.training.test_checkpoint import Payload

    (tmp_path / "bad").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "pkg://lora_exp/assets/tiny"}
    config |= {"task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}
    (tmp_path / "bad/adapter_config.json").write_text(json.dumps(config))
    mark = tmp_path / "mark"
    (tmp_path / "bad/adapter_model.bin").write_bytes(pickle.dumps(Payload(mark), protocol=2))
    done = cli(*RUN, "adapter=bad", cwd=tmp_path)
    assert done.returncode == 1
    assert "AdapterError: bad holds code where numbers belong" in done.stderr
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_a_job_that_exits_with_zero_counts_as_failed_and_the_sweep_continues(
    tmp_path: Path,
) -> None:
    (tmp_path / "leaving.py").write_text(
        "import sys\ndef leave(completions, **_):\n    sys.exit(0)\n"
    )
    rewards = "algorithm.rewards=[leaving.leave],[lora_exp.rewards.similarity]"
    overrides = ["experiment=demo_grpo", "data.rows=16", "data.eval_rows=4", "samples.rows=2"]
    overrides += ["train.max_steps=2", "train.per_device_train_batch_size=8", "tracking=none"]
    done = cli(
        "-m", *overrides, rewards, "trusted_targets=[leaving.leave]", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [status_of(tmp_path / "sweep" / n) for n in "01"] == ["failed", "finished"]
    assert "the job called sys.exit(0)" in done.stdout


def test_canaries_in_environment_and_config_are_in_no_file(tmp_path: Path) -> None:
    canaries = {
        "WANDB_API_KEY": "canary-of-wandb-0123456789012345678901234",
        "HF_TOKEN": "hf_canaryOfTheHub0123456789abcdef",
        "DATABASE_PASSWORD": "canary-of-a-database",
    }
    environment = os.environ | canaries | {"WANDB_MODE": "offline"}
    command = ["-m", "lora_exp", *QUICK]
    command += ["train.save_strategy=steps", "train.save_steps=1"]
    canary = canaries["DATABASE_PASSWORD"]
    for key in ("", "tracking.project", "name", "+train.hub_token"):
        overrides = [f"{key}={canary}"] if key else []
        folder = key.strip("+") or "run"
        arguments = [*command, *overrides, f"hydra.run.dir={folder}"]
        done = python(*arguments, cwd=tmp_path, env=environment)
        assert done.returncode == (1 if overrides else 0), done.stderr
        assert not overrides or f"{folder}: is a secret" in done.stderr
        assert not [value for value in canaries.values() if value in done.stdout + done.stderr]
    assert (tmp_path / "run/adapter/README.md").is_file()
    assert list((tmp_path / "run/wandb").rglob("*.wandb"))
    assert (tmp_path / "run/checkpoints/checkpoint-3/training_args.bin").is_file()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [key for key, canary in canaries.items() if canary.encode() in content], path


def test_an_adapter_is_refused_on_a_base_of_other_layers_or_sizes(tmp_path: Path) -> None:
    overrides = [*SETTINGS, "train.max_steps=1"]
    saved = run(compose(*overrides), tmp_path / "run").saved
    saved.rename(tmp_path / "adapter")  # without its run's record
    for key, value in (("hidden_size", 96), ("num_hidden_layers", 3), ("num_hidden_layers", 5)):
        base = shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / f"{key}{value}/tiny")
        config = AutoConfig.from_pretrained(base, **{key: value})
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        other = compose(*overrides, f"model.path={base}", f"adapter={tmp_path}/adapter")
        with pytest.raises(AdapterError, match="adapter does not fit this base: "):
            run(other, base / "run")


def test_a_run_interrupted_after_its_last_step_can_be_resumed(tmp_path: Path) -> None:
    settings = [*RUN, "train.save_strategy=no", "train.max_steps=5", "samples.max_new_tokens=400"]
    settings += ["samples.rows=96", "data.max_eval_rows=96", "samples.batch_size=1"]
    process = start(tmp_path, *settings)
    wait_for(
        process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 6
    )  # one evaluation and five steps
    time.sleep(0.2)  # the step ends; then 96 prompts are answered one by one
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 75, stderr
    assert (tmp_path / "run/checkpoints/checkpoint-5").is_dir()
    done = cli("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["steps"] == 5


def test_when_the_launcher_is_killed_every_job_saves(tmp_path: Path) -> None:
    overrides = [
        override
        for override in RUN
        if not override.startswith(("hydra.", "train.save", "train.max_steps"))
    ]
    overrides += ["train.save_strategy=no", "train.max_steps=400", "hydra.sweep.dir=sweep"]
    process = start(tmp_path, "-m", "peft.r=2,4,8", *overrides)
    wait_for(
        process, lambda: all(count_lines(tmp_path / f"sweep/{n}/metrics.jsonl") > 3 for n in "012")
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start_time = time.perf_counter()
    while "running" in {status_of(tmp_path / "sweep" / n) for n in "012"}:
        time.sleep(0.05)
        assert time.perf_counter() - start_time < 60
    assert {status_of(tmp_path / "sweep" / n) for n in "012"} == {"interrupted"}
    assert all(list((tmp_path / f"sweep/{n}/checkpoints").glob("checkpoint-*")) for n in "012")


def test_a_second_ctrl_c_stops_a_sweep_at_once(tmp_path: Path) -> None:
    overrides = [
        override for override in RUN if not override.startswith(("hydra.", "train.per_device"))
    ]
    overrides += ["train.per_device_train_batch_size=256", "train.gradient_accumulation_steps=50"]
    overrides += ["data.max_rows=null", "hydra.sweep.dir=sweep"]
    process = start(tmp_path, "-m", "peft.r=2,4", *overrides)
    wait_for(process, lambda: all(count_lines(tmp_path / f"sweep/{n}/metrics.jsonl") for n in "01"))
    time.sleep(2)  # the first of their long steps has begun
    interrupt_twice(process, os.killpg)
    assert {status_of(tmp_path / "sweep" / n) for n in "01"} == {"interrupted"}
