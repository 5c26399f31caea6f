"""A sweep on a real Slurm of two nodes, and what a launch does when Slurm jobs end too early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from hydra_plugins.lockstep_launcher import __main__ as program_file
from hydra_plugins.lockstep_launcher._cells import Cells
from hydra_plugins.lockstep_launcher.config import SlurmConfig
from lora_exp.errors import ConfigError
from lora_exp.files.lock import Lock, in_use
from lora_exp.lockstep import cluster as cluster_file
from lora_exp.lockstep.cluster import PROGRAM, Cluster
from lora_exp.lockstep.plan import Job, ranges
from lora_exp.lockstep.slurm import Slurm
from lora_exp.lockstep.work import Work
from lora_exp.lockstep.workers import DiedError
from lora_exp.runs.listing import select
from lora_exp.search.journal import JOURNAL
from tests.conftest import QUICK
from tests.lockstep.programs import install, program
from tests.lockstep.test_brackets import HALVING, read_records
from tests.lockstep.test_cells import launcher
from tests.test_main import cli
from tests.warm import Process, python

STEPS = ["tracking=none", *QUICK, "samples.rows=0", "train.max_steps=16", "train.save_steps=2"]
STEPS += ["train.save_strategy=steps"]
STEPS += ["train.eval_strategy=no", "data.max_rows=16", "data.max_eval_rows=4", "lockstep.verify=0"]
SWEEP = ["-m", "peft.r=2,4", "seed=1,2", *STEPS, "hydra.sweep.dir=a/b"]
SITE = """\
# @package _global_
# as a site would set it for all sweeps
hydra: {launcher: {executor: slurm, workers: 2, slurm: {partition: main, time: 30}}}
"""
SLURM = ["hydra.launcher.executor=slurm", "hydra.launcher.workers=2"]


def adapters(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.glob("a/b/*/adapter/adapter_model.safetensors"))
    return {path.parts[-3]: path.read_bytes() for path in paths}


def shares(sweep: Path) -> list[Path]:
    return sorted(sweep.glob("slurm/*/*.json"))


def worker_of(share: str) -> int:
    """Return the process that Slurm has started for a share."""
    for process in Path("/proc").glob("[0-9]*"):
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if PROGRAM in words and words[-2].endswith(share) and "srun" not in words[0]:
            return int(process.name)
    raise AssertionError(f"no process has {share}")


def test_a_sweep_on_slurm_ends_with_the_same_bytes_though_a_job_is_killed(
    slurm: None, tmp_path: Path
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/site.yaml").write_text(SITE)
    site = ["--config-dir", str(tmp_path / "conf"), *SWEEP, "experiment=site"]
    sweep = tmp_path / "there/a/b"
    with (tmp_path / "out").open("w") as output:
        process = Process(
            "-m", "lora_exp", *site, cwd=tmp_path / "there", stdout=output, stderr=output
        )
        share = sweep / "slurm/0/0.json"
        while not share.is_file() or not list(sweep.glob("*/checkpoints/checkpoint-*")):
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.02)
        jobs = list(json.loads(share.read_text())["jobs"])
        while not list(sweep.glob(f"{jobs[0]}/checkpoints/checkpoint-*")):
            time.sleep(0.02)
        os.kill(worker_of("slurm/0/0"), signal.SIGKILL)
        statuses = {row.run.directory.name: row.value("status") for row in select([sweep])}
        assert cli(*SWEEP, cwd=tmp_path / "here").returncode == 0
        assert process.wait() == 0
    assert statuses[jobs[0]] in ("running", "killed")
    text = (tmp_path / "out").read_text()
    assert f"Slurm job 1_0 has ended before jobs {', '.join(jobs)}: sent again" in text
    assert list(json.loads((sweep / "slurm/1/0.json").read_text())["jobs"]) == jobs
    assert [row["status"] for row in json.loads((sweep / "summary.json").read_text())] == [
        "finished"
    ] * 4
    records = [json.loads((sweep / job / "run.json").read_text()) for job in jobs]
    assert [record["resumed"][0]["status"] for record in records] == ["running"] * 2
    assert {record["place"] for record in records} == {"lockstep, exact"}
    assert adapters(tmp_path / "there") == adapters(tmp_path / "here")
    assert len(adapters(tmp_path / "here")) == 4


def test_a_search_that_stops_losers_is_on_slurm_what_it_is_here(
    slurm: None, tmp_path: Path
) -> None:
    space = ["peft.r=2,4", "train.learning_rate=tag(log,interval(1e-4,3e-3))"]
    search = ["-m", "hydra/sweeper=search", "hydra.sweeper.sampler=random", *space]
    search += ["hydra.sweeper.trials=4", "hydra.sweeper.batch=4", *STEPS, *HALVING]
    search += ["hydra.sweep.dir=a/b", "early_stopping.keep=true"]
    for name, where in (("here", []), ("there", SLURM)):
        (tmp_path / name).mkdir()
        done = cli(*search, *where, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    sweeps = [tmp_path / name / "a/b" for name in ("here", "there")]
    here, there = (
        [(r["status"], r["steps"], r["rungs"], r.get("stopped")) for r in records]
        for records in map(read_records, sweeps)
    )
    assert there == here
    assert sorted((status, steps) for status, steps, *_ in here) == [
        ("finished", 16), ("pruned", 4), ("pruned", 4), ("pruned", 8),
    ]  # fmt: skip
    journals = [(sweep / JOURNAL).read_bytes() for sweep in sweeps]
    assert journals[0] == journals[1]
    assert adapters(tmp_path / "there") == adapters(tmp_path / "here")
    assert len(adapters(tmp_path / "here")) == 4
    # at each rung the live jobs were sent again, to the same two Slurm jobs at most
    assert 4 < len(shares(sweeps[1])) <= 6


def test_a_cancelled_slurm_job_saves_and_one_that_is_put_back_goes_on(
    slurm: None, tmp_path: Path
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    sweep = tmp_path / "there/a/b"
    with (tmp_path / "out").open("w") as output:
        words = ["-m", "lora_exp", *SWEEP, *SLURM]
        process = Process(*words, cwd=tmp_path / "there", stdout=output, stderr=output)

        def seen(pattern: str) -> re.Match[str]:
            while not (found := re.search(pattern, (tmp_path / "out").read_text())):
                assert process.poll() is None
                time.sleep(0.02)
            return found

        job = seen(r"Slurm job (\d+)_1: ")[1]
        commands = (["scancel"], ["scontrol", "requeue"])
        for share, command in enumerate(commands):
            first = next(iter(json.loads((sweep / f"slurm/0/{share}.json").read_text())["jobs"]))
            while not list(sweep.glob(f"{first}/checkpoints/checkpoint-*")):
                assert process.poll() is None
                time.sleep(0.02)
            subprocess.run([*command, f"{job}_{share}"], check=True)
        seen(rf"job {job}_1 .*: pending \(BeginTime\)")  # Slurm lets it wait for two minutes
        subprocess.run(["scontrol", "update", f"JobId={job}_1", "StartTime=now"], check=True)
        assert cli(*SWEEP, cwd=tmp_path / "here").returncode == 0
        assert process.wait() == 0
    assert adapters(tmp_path / "there") == adapters(tmp_path / "here")
    text = (tmp_path / "out").read_text()
    jobs = [ranges(map(int, json.loads(path.read_text())["jobs"])) for path in shares(sweep)]
    assert f"Slurm job {job}_0 (jobs {jobs[0]}): cancelled" in text
    assert text.count(": its jobs have saved\n") == 1
    assert f"Slurm job {job}_0 has ended before jobs {jobs[0]}: sent again" in text
    assert re.search(rf"Slurm job {job}_1 \(jobs {jobs[1]}\): runs on n.\n", text.split("Begin")[1])
    assert jobs == [jobs[0], jobs[1], jobs[0]]  # only the first one's were submitted again
    statuses = [[r["status"] for r in record["resumed"]] for record in read_records(sweep)]
    assert sorted(statuses) == [["interrupted"]] * 4


def test_jobs_whose_slurm_jobs_die_again_and_again_fail_with_the_reason(
    slurm: None, tmp_path: Path
) -> None:
    settings = ["hydra.launcher.slurm.retries=0", "hydra.launcher.slurm.setup=[exit 3]"]
    done = cli("-m", "peft.r=2,4", *STEPS, *SLURM, *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert "to be tried again, alone: jobs [0, 1]" in done.stdout + done.stderr
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert len([path for path in shares(sweep) if path.parent.name == "1"]) == 2  # both at once
    (summary,) = tmp_path.glob("multirun/*/*/summary.json")
    rows = {row["job"]: (row["status"], row["error"]) for row in json.loads(summary.read_text())}
    assert {status for status, _ in rows.values()} == {"failed"}
    assert all(
        "ended before its jobs: failed (NonZeroExitCode), also when" in e for _, e in rows.values()
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_an_unknown_partition_is_one_clear_line_and_nothing_is_submitted(
    slurm: None, tmp_path: Path
) -> None:
    done = cli(*SWEEP, *SLURM, "hydra.launcher.slurm.partition=nope", cwd=tmp_path)
    expected = "hydra.launcher.slurm.partition: sbatch refuses: invalid partition specified: nope"
    assert (done.returncode, done.stderr) == (1, f"ConfigError: {expected}\n")
    assert not list(tmp_path.glob("a/b/slurm/*/*.jsonl"))
    queue = subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True)
    assert queue.stdout == ""


# each submission runs the next of the scripts in its own folder; all Slurm jobs have ended at once
SBATCH = """n=$(($(cat count) + 1)); echo $n > count
cd "$(dirname "$1")" && sh "$OLDPWD/script-$n" >> 0.jsonl; echo "Submitted batch job $n\""""
SQUEUE = """n=$(cat count); echo "$n|FAILED|n1|NonZeroExitCode"; sh squeue-$n 2> /dev/null; true"""


class Launch:
    """Keeps what a launch is told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.results: dict[int, JobReturn] = {}

    def began(self, number: int) -> None:
        self.begun.append(number)

    def ended(self, number: int, result: JobReturn) -> None:
        assert number not in self.results
        assert Path(f"{number}/run.json").is_file()  # which its table reads
        self.results[number] = result

    def unproven(self, numbers: list[int], difference: str) -> None:
        raise AssertionError(numbers)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Two jobs, and programs in place of Slurm's, in the current directory."""
    folder = install(tmp_path, monkeypatch)
    program(folder, "sbatch", SBATCH)
    program(folder, "squeue", SQUEUE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster_file, "LOOK_S", 0.01)
    (tmp_path / "count").write_text("0")
    jobs = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        hydra: dict[str, Any] = {
            "runtime": {"output_dir": str(tmp_path / str(number)), "config_sources": []},
            "overrides": {"task": ["a=1"], "hydra": []},
            "sweep": {"dir": "sweep"},
            "job": {"name": "run", "config_name": "config"},
        }
        hydra["job"]["config"] = {"override_dirname": {"exclude_keys": []}}
        config = OmegaConf.create({"hydra": hydra})
        jobs.append(Job(number, config, None, tmp_path / str(number), ("a=1",)))
    return Work(tuple(jobs), None, None)


def executor(**section: Any) -> Cluster:
    return Cluster(Slurm(asdict(SlurmConfig(**section))), Path("sweep"), None)


def script(name: str, *lines: object) -> None:
    """Write a program that prints lines of JSON."""
    Path(f"script-{name}").write_text("".join(f"echo '{json.dumps(line)}'\n" for line in lines))


def test_only_what_is_left_is_sent_again_and_a_record_is_waited_for(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("0/run.json").write_text('{"status": "finished"}')
    # the first job ends and the second is interrupted; the next Slurm job repeats the first's end
    end = ["ended", 0, "finished", "", 0.5, "finished"]
    script("1", ["began", 0], end, ["began", 1], ["ended", 1, "interrupted", "", None, "x"])
    script("2", ["began", 0], end, ["began", 1], ["ended", 1, "failed", "why", None, "diverged"])
    # the record of the second becomes visible late
    Path("squeue-2").write_text('echo \'{"status": "diverged"}\' > 1/run.json')
    launch = Launch()
    executor(retries=1).run([work], launch)
    assert launch.begun == [0, 1, 1]
    assert launch.results[0].return_value == 0.5
    assert str(launch.results[1]._return_value) == "why"
    shares = [json.loads(Path(f"sweep/slurm/{n}/0.json").read_text())["jobs"] for n in "01"]
    assert shares == [{"0": ["a=1"], "1": ["a=1"]}, {"1": ["a=1"]}]
    assert "Slurm job 1 has ended before job 1: sent again" in capsys.readouterr().out


def test_a_slurm_job_that_saves_something_is_sent_again_more_often_than_one_that_does_not(
    work: Work,
) -> None:
    for n in range(1, 9):
        script(str(n))
    for n in (2, 4):  # while these are followed, the next checkpoint appears
        Path(f"squeue-{n}").write_text(f"mkdir -p 1/checkpoints/checkpoint-{n}0")
    with pytest.raises(DiedError) as error:
        executor(retries=1).run([work], Launch())
    assert error.value.jobs == [0, 1]
    expected = "Slurm job 6 (logs in sweep/slurm/5) ended before its jobs: failed (NonZeroExitCode)"
    assert str(error.value) == expected


def test_a_secret_is_not_written_to_a_share(work: Work) -> None:
    secret = "train.hub_token=hf_" + "a" * 34
    work.jobs[0].overrides += (secret,)
    with pytest.raises(ConfigError, match=r"train.hub_token: is a secret, and a share is a file"):
        executor().run([work], Launch())
    assert not Path("sweep").exists()


def test_shares_hold_the_directories_of_their_jobs_and_one_config_is_made_for_all(
    work: Work, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = Cells(launcher(loader, "hydra.sweep.dir=out/r${peft.r}"), True, [])
    compose, made = cells._composed, list[int]()
    monkeypatch.setattr(cells, "_composed", lambda o, n: made.append(n) or compose(o, n))
    jobs = [cells.job([f"peft.r={r}", "tracking=none"], n) for n, r in enumerate((16, 8, 8))]
    shares = [Work(tuple(jobs[:2]), None, None), Work((jobs[2],), None, None)]
    made.clear()
    with pytest.raises(DiedError):
        executor(retries=0).run(shares, Launch())
    assert made == [0]
    again: list[Job] = []
    for path in sorted(Path("sweep/slurm/0").glob("*.json")):
        monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)  # as in a process of its own
        again += program_file.composed(json.loads(path.read_text()))[1]
    assert [str(job.directory) for job in again] == ["out/r16/0", "out/r8/1", "out/r8/2"]
    assert [job.directory for job in again] == [job.directory for job in jobs]
    for job in again:
        assert job.config.hydra.runtime.output_dir == str(job.directory.absolute())


def test_many_shares_are_looked_at_less_often(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cluster_file, "FILES_PER_S", 20)
    monkeypatch.setattr(cluster_file.time, "sleep", waits.append)
    shares = [Work((job,), None, None) for job in work.jobs]
    with pytest.raises(DiedError):
        executor(retries=0).run(shares, Launch())
    assert waits[0] == len(shares) / 20


def test_a_pause_is_taken_when_its_own_record_is_visible_and_other_folders_do_not_matter(
    work: Work,
) -> None:
    """On NFS the record may be that of the pause before, at another rung."""
    (Path("1/checkpoints/checkpoint-10-keep")).mkdir(parents=True)
    Path("0/run.json").write_text('{"status": "paused", "rungs": [{}]}')
    Path("1/run.json").write_text('{"status": "finished"}')
    script(
        "1",
        ["ended", 0, "paused", "", None, "paused", 2],
        ["ended", 1, "finished", "", 1, "finished", 0],
    )
    late = 'echo \'{"status": "paused", "rungs": [{}, {}]}\' > 0/run.json'
    Path("squeue-1").write_text(f"[ -e asked ] && {late}; touch asked")
    seen = []

    class Counts(Launch):
        def ended(self, number: int, result: JobReturn) -> None:
            super().ended(number, result)
            seen.append((number, Path(f"{number}/run.json").read_text().count("{}")))

    executor(retries=0).run([work], Counts())
    assert seen == [(0, 2), (1, 0)]


def test_a_share_waits_for_the_process_that_had_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(0, OmegaConf.create(), None, tmp_path / "0")
    lock, began = Lock(job.directory, "hydra.run.dir"), time.monotonic()
    threading.Timer(0.5, lock.release).start()
    program_file._wait_until_free([job])
    assert time.monotonic() - began >= 0.5
    assert not in_use(job.directory)
    monkeypatch.setattr(program_file, "LEAVE_S", 0.0)
    lock = Lock(job.directory, "hydra.run.dir")
    program_file._wait_until_free([job])  # the run then says who holds its directory
    lock.release()


def test_a_share_does_not_begin_if_the_process_above_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text("{}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    done = python("-m", PROGRAM, str(tmp_path / "0"), str(ended.pid))
    assert (done.returncode, done.stderr) == (130, "")
