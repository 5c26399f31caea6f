"""What is asked of Slurm, and what is refused before it is asked."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.lockstep_launcher.config import SlurmConfig
from lora_exp.errors import ConfigError, ExtraError, LoraExpError
from lora_exp.lockstep import slurm
from lora_exp.lockstep.engine import State
from lora_exp.lockstep.slurm import Slurm
from tests.lockstep.programs import install, program


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path, monkeypatch)


def section(**values: Any) -> dict[str, Any]:
    return asdict(SlurmConfig(**values))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"time": "soon"}, 'time: soon is no time; give minutes, or a text like "12:00:00"'),
        ({"time": 2}, "time: 2: jobs save 2 minutes before it; give more"),
        ({"gpus": 4}, "gpus: 4: a pack trains on one GPU; give 1, or its type too: a100:1"),
        ({"cpus": 0}, "cpus: 0 is too few; give 1 or more"),
        ({"retries": -1}, "retries: -1 is too few; give 0 or more"),
        ({"memory": "much"}, "memory: much is no memory; give a number with its unit, like 32G"),
        ({"options": {"--qos": "x"}}, "options: '--qos' is no long option of sbatch"),
        ({"options": "qos"}, "options: qos is no dict of sbatch's long options: {qos: high}"),
        ({"options": {"time": 5}}, "options.time: is set by lora-exp, from a key of hydra."),
        ({"options": {"job-name": "x"}}, "options.job-name: is set by lora-exp, from a key of"),
        ({"setup": [f"export HF_TOKEN=hf_{'a' * 34}"]}, "setup: holds a secret, and the batch"),
    ],
)
def test_a_value_that_sbatch_would_not_take_is_refused(
    programs: Path, values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Slurm(section(**values))
    assert str(error.value).startswith(f"hydra.launcher.slurm.{fault}")


def test_times_gpus_and_memory_are_taken_as_sbatch_reads_them(programs: Path) -> None:
    for time in (90, "90", "30:00", "12:00:00", "1-12", "1-12:30:00"):
        cluster = Slurm(section(time=time, gpus="a100:1", memory="32G"))
        parameters = cluster._parameters
        assert [parameters[k] for k in ("time", "gpus_per_node", "mem")] == [time, "a100:1", "32G"]


def test_a_machine_without_slurm_or_submitit_is_refused(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r'pip install "lora-exp\[cluster\]"'):
        Slurm(section())
    monkeypatch.setenv("PATH", str(programs.parent))
    with pytest.raises(ConfigError, match=r"hydra.launcher.executor: slurm: there is no sbatch"):
        Slurm(section())


def test_the_batch_script_has_what_the_config_asks_for(programs: Path, tmp_path: Path) -> None:
    settings = section(
        partition="gpu", account="a1", time="12:00:00", gpus="a100:1", cpus=4, memory="32G",
        setup=["module load cuda"], options={"qos": "high", "requeue": True},
    )  # fmt: skip
    assert Slurm(settings).submit(["train", "a b"], tmp_path / "log", 3) == ["7_0", "7_1", "7_2"]
    lines = (tmp_path / "log/7_submission.sh").read_text().splitlines()
    flags = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert flags >= {
        "partition=gpu", "account=a1", "time=12:00:00", "gpus-per-node=a100:1", "cpus-per-task=4",
        "mem=32G", "qos=high", "requeue", "signal=TERM@120", "array=0-2%3",
    }  # fmt: skip
    assert not any(flag.startswith("wckey") for flag in flags)
    exports = [line for line in lines if line.startswith("export")]
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}" in exports
    (command,) = (line for line in lines if line.startswith("srun "))
    file = f'{tmp_path / "log"}/"${{SLURM_ARRAY_TASK_ID:-0}}"'
    assert command.endswith(f" --cpus-per-task=4 --nodes=1 --ntasks=1 train 'a b' {file}")
    assert lines.index("module load cuda") < lines.index(command)


def test_what_is_not_set_is_left_to_slurm(programs: Path, tmp_path: Path) -> None:
    assert Slurm(section()).submit(["train", "a b"], tmp_path / "log", 1) == ["7"]
    text = (tmp_path / "log/7_submission.sh").read_text()
    for option in ("partition", "account", "time", "gpus", "mem", "array"):
        assert f"--{option}" not in text


def test_slurms_refusal_is_one_line(
    programs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program(programs, "sbatch", "echo 'sbatch: error: no such account' >&2; exit 1")
    with pytest.raises(ConfigError) as error:
        Slurm(section()).submit(["train", "a b"], tmp_path / "log", 1)
    assert str(error.value) == "hydra.launcher.slurm: sbatch refuses: no such account"
    assert capfd.readouterr().err == ""
    for cause in ("error: Munge encode failed: no socket", "fatal: no configuration source"):
        lines = ["error: If munged is up, restart it", cause, "error: Batch job submission failed"]
        program(programs, "sbatch", f"printf 'sbatch: %s\\n' {shlex.join(lines)} >&2; exit 1")
        with pytest.raises(ConfigError, match=f"refuses: {cause.partition(': ')[2]}$"):
            Slurm(section()).submit(["train", "a b"], tmp_path / "log", 1)
    program(programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(LoraExpError, match="squeue: Unable to contact"):
        Slurm(section()).states()


def test_states_are_read_with_nodes_and_reasons(programs: Path) -> None:
    lines = ["7_0|RUNNING|n1|None", "7_1|PENDING||Resources", "8|OUT_OF_MEMORY|n2|OutOfMemory"]
    program(programs, "squeue", f"printf '%s\\n' {' '.join(map(repr, lines))}")
    states = Slurm(section()).states()
    assert states["7_0"] == State(True, "runs on n1")
    assert states["7_1"].text == "pending (Resources)"
    assert states["8"].text == "out of memory (OutOfMemory)"
    assert [state.in_queue for state in states.values()] == [True, True, False]


def test_what_trains_is_asked_to_save_and_what_waits_is_cancelled(
    programs: Path, tmp_path: Path
) -> None:
    program(programs, "scancel", f'echo "$@" >> {tmp_path}/calls; exit 1')  # one had ended
    cluster = Slurm(section())
    cluster.stop(["7_0", "8"])
    cluster.stop(["7_0"], at_once=True)
    cluster.stop([])
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--state=PENDING 7_0 8", "--state=RUNNING --signal=TERM 7_0 8", "7_0",
    ]  # fmt: skip


def test_only_jobs_of_the_folder_that_have_not_ended_are_an_earlier_launchs(
    programs: Path, tmp_path: Path
) -> None:
    lines = ["7_0|RUNNING|n1|None", "7_1|COMPLETED|n1|None", "8|PENDING||None", "9|RUNNING|n2|None"]
    program(programs, "squeue", f"printf '%s\\n' {' '.join(map(repr, lines))}")
    for job in (7, 8):
        (tmp_path / f"slurm/{job}").mkdir(parents=True)
        (tmp_path / f"slurm/{job}/{job}_submission.sh").touch()
    assert Slurm(section()).earlier(tmp_path / "slurm") == ["7_0", "8"]


def test_the_variables_of_a_slurm_job_that_launches_are_not_passed_on(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "sbatch", f"env > {tmp_path}/seen; echo Submitted batch job 7")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_CPU", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/conf")
    (tmp_path / "sent").mkdir()
    assert Slurm(section()).submit(["true"], tmp_path / "sent", 1) == ["7"]
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line for line in seen if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/conf"]
    assert os.environ["SLURM_NTASKS"] == "5"
