"""Faults from outside, really injected: kill -9, a full disk, no memory, a second process.

What is short here is run a hundred times by scripts/faults; docs/reliability.md has the whole list.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_exp.files.paths import asset
from tests.conftest import QUICK
from tests.files.test_whole import in_a_small_disk
from tests.test_experiment import digest
from tests.test_main import cli
from tests.training.test_interruption import lines, started, status, wait_for

RUN = ["tracking=none", *QUICK, "train.max_steps=60", "train.save_strategy=steps"]
RUN += ["train.save_steps=5", "train.logging_steps=1", "train.per_device_train_batch_size=4"]
RUN += ["peft.lora_dropout=0.1", "train.eval_strategy=no", "hydra.run.dir=run", "samples.rows=0"]


def kill(folder: Path, command: list[str], dice: random.Random, saving: bool) -> bool:
    """Run a command and kill -9 it, in a save or anywhere in training; say if it was in a save."""
    process = started(folder, *command)
    log, checkpoints = folder / "run/metrics.jsonl", folder / "run/checkpoints"
    after = dice.randrange(1, 58)
    wait_for(process, lambda: lines(log) > after)
    if saving:
        wait_for(process, lambda: any(checkpoints.glob(".staged-*")))
        time.sleep(dice.uniform(0, 0.02))
    else:
        time.sleep(dice.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert status(folder / "run") == "running"
    return any(checkpoints.glob(".staged-*"))


def survives(folder: Path, number: int, undisturbed: dict[str, str]) -> tuple[bool, bool]:
    """Kill a run once and resume it.

    Returns:
        Whether its adapter is that of a run left in peace, and whether it was killed in a save.
    """
    folder.mkdir(parents=True)
    in_a_save = kill(folder, RUN, random.Random(number), saving=number % 2 == 0)
    done = cli("resume=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return digest(folder / "run/adapter") == undisturbed, in_a_save


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli(*RUN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return digest(folder / "run/adapter")


@pytest.mark.parametrize("number", range(4))
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    number: int, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    same, _ = survives(tmp_path / "killed", number, undisturbed)
    assert same


def test_a_full_disk_is_told_and_the_checkpoint_before_works(
    undisturbed: dict[str, str], tmp_path: Path
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
    done = in_a_small_disk(tmp_path, script, "24m")
    said = done.stdout + done.stderr
    assert "exit 1" in said
    assert "No space left on device" in said
    assert "make room" in said
    assert "Traceback" not in said
    assert ".staged" not in said
    assert digest(tmp_path / "adapter") == undisturbed, said


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    first = started(tmp_path, *RUN, "train.max_steps=30")
    wait_for(first, lambda: lines(tmp_path / "run/metrics.jsonl") >= 1)
    first.send_signal(signal.SIGSTOP)  # however slow the second is
    for command in (["resume=run"], RUN):
        second = cli(*command, cwd=tmp_path)
        assert second.returncode == 1
        assert "Traceback" not in second.stderr
        known = "holds a run already" if command is RUN else f"in use by process {first.pid} on"
        assert known in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert first.communicate()[1] == ""
    assert status(tmp_path / "run") == "finished"


OUT_OF_MEMORY = """
import json, os, resource, sys
from pathlib import Path
from lora_exp import compose, run

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

few = json.loads(sys.argv[1])
run(compose(*few, "seed=7"), "warm")  # imports and caches that stay
environment, before = dict(os.environ), resident()
for number in range(3):
    held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (held + 96 * 2**20, -1))
    try:
        run(compose(*few, "train.per_device_train_batch_size=64"), f"large{number}")
        sys.exit("it had enough memory")
    except (MemoryError, RuntimeError) as error:
        print("failed:", type(error).__name__, str(error)[:60])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert dict(os.environ) == environment
run(compose(*few), "after")
print("grown by MiB:", (resident() - before) // 2**20)
"""


def test_after_three_jobs_without_memory_a_run_is_as_in_a_fresh_process(tmp_path: Path) -> None:
    few = [o for o in RUN if not o.startswith("hydra.")]
    few += ["train.max_steps=3", "algorithm.args.packing=false"]
    command = [sys.executable, "-c", OUT_OF_MEMORY, json.dumps(few)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("failed:") == 3, done.stdout
    (grown,) = (line for line in done.stdout.splitlines() if line.startswith("grown"))
    assert int(grown.rpartition(" ")[2]) < 100
    assert [status(tmp_path / f"large{n}") for n in range(3)] == ["failed"] * 3
    fresh = cli(*few, "hydra.run.dir=fresh", cwd=tmp_path)
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


def test_a_job_that_exits_with_zero_ends_neither_the_sweep_nor_its_exit_code(
    tmp_path: Path,
) -> None:
    (tmp_path / "leaving.py").write_text(
        "import sys\ndef leave(completions, **_):\n    sys.exit(0)\n"
    )
    rewards = "algorithm.rewards=[leaving.leave],[lora_exp.rewards.similarity]"
    few = ["experiment=demo_grpo", "data.rows=16", "data.eval_rows=4", "samples.rows=2"]
    few += ["train.max_steps=2", "train.per_device_train_batch_size=8", "tracking=none"]
    done = cli(
        "-m", *few, rewards, "trusted_targets=[leaving.leave]", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [status(tmp_path / "sweep" / n) for n in "01"] == ["failed", "finished"]
    assert "the job called sys.exit(0)" in done.stdout


def test_canaries_in_environment_and_config_are_in_no_file(tmp_path: Path) -> None:
    canaries = {
        "WANDB_API_KEY": "canary-of-wandb-0123456789012345678901234",
        "HF_TOKEN": "hf_canaryOfTheHub0123456789abcdef",
        "DATABASE_PASSWORD": "canary-of-a-database",
    }
    environment = os.environ | canaries | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "lora_exp", *QUICK]
    command += ["train.save_strategy=steps", "train.save_steps=1"]
    canary = canaries["DATABASE_PASSWORD"]
    for key in ("", "tracking.project", "name", "+train.hub_token"):
        said = [f"{key}={canary}"] if key else []
        folder = key.strip("+") or "run"
        done = subprocess.run(
            [*command, *said, f"hydra.run.dir={folder}"], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == (1 if said else 0), done.stderr
        assert not said or f"{folder}: is a secret" in done.stderr
        assert not [c for c in canaries.values() if c in done.stdout + done.stderr]
    assert (tmp_path / "run/adapter/README.md").is_file()
    assert list((tmp_path / "run/wandb").rglob("*.wandb"))
    assert (tmp_path / "run/checkpoints/checkpoint-3/training_args.bin").is_file()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        held = path.read_bytes()
        assert not [key for key, canary in canaries.items() if canary.encode() in held], path


@pytest.mark.parametrize(
    "other", [{"hidden_size": 96}, {"num_hidden_layers": 3}, {"num_hidden_layers": 5}]
)
def test_an_adapter_is_refused_on_a_base_of_other_layers_or_sizes(
    other: dict[str, int], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    done = cli(*RUN, "train.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run/adapter").rename(tmp_path / "adapter")  # away from its record
    shutil.copytree(asset("pkg://lora_exp/assets/tiny"), tmp_path / "tiny")
    config = AutoConfig.from_pretrained(tmp_path / "tiny", **other)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    again = [o for o in RUN if not o.startswith("hydra.")]
    done = cli(*again, "model.path=tiny", "adapter=adapter", cwd=tmp_path)
    assert done.returncode == 1
    assert "AdapterError: adapter does not fit this base: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_not_lost_when_it_is_asked_to_stop_after_its_last_step(tmp_path: Path) -> None:
    settings = [*RUN, "train.save_strategy=no", "train.max_steps=5", "samples.max_new_tokens=400"]
    settings += ["samples.rows=96", "data.max_eval_rows=96", "samples.batch_size=1"]
    process = started(tmp_path, *settings)
    wait_for(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 6)  # measured, five steps
    time.sleep(0.2)  # the step ends; then 96 prompts are answered one by one
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert (tmp_path / "run/checkpoints/checkpoint-5").is_dir()
    done = cli("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["steps"] == 5


def test_when_the_launcher_is_killed_every_job_saves(tmp_path: Path) -> None:
    few = [o for o in RUN if not o.startswith(("hydra.", "train.save", "train.max_steps"))]
    few += ["train.save_strategy=no", "train.max_steps=400", "hydra.sweep.dir=sweep"]
    process = started(tmp_path, "-m", "peft.r=2,4,8", *few)
    wait_for(process, lambda: all(lines(tmp_path / f"sweep/{n}/metrics.jsonl") > 3 for n in "012"))
    process.kill()
    process.communicate()
    began = time.perf_counter()
    while "running" in {status(tmp_path / "sweep" / n) for n in "012"}:
        time.sleep(0.05)
        assert time.perf_counter() - began < 60
    assert {status(tmp_path / "sweep" / n) for n in "012"} == {"interrupted"}
    assert all(list((tmp_path / f"sweep/{n}/checkpoints").glob("checkpoint-*")) for n in "012")


def test_a_second_ctrl_c_stops_a_sweep_at_once(tmp_path: Path) -> None:
    few = [o for o in RUN if not o.startswith(("hydra.", "train.per_device"))]
    few += ["train.per_device_train_batch_size=256", "train.gradient_accumulation_steps=50"]
    few += ["data.max_rows=null", "hydra.sweep.dir=sweep"]
    process = started(tmp_path, "-m", "peft.r=2,4", *few)
    wait_for(process, lambda: all(lines(tmp_path / f"sweep/{n}/metrics.jsonl") for n in "01"))
    time.sleep(2)  # in the first of their long steps
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert {status(tmp_path / "sweep" / n) for n in "01"} == {"interrupted"}
