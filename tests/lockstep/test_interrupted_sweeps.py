"""Sweeps that are killed, interrupted, resumed or refused, and jobs that are trained again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

from lora_exp import compose, run
from lora_exp.record.sweep import SUMMARY, read_rows
from tests.conftest import ROOT
from tests.lockstep.test_launcher import STEPS, adapter_hashes, read_summary
from tests.test_main import cli
from tests.warm import Process, python

FORTY = [*STEPS[:-1], "train.max_steps=40", "train.save_strategy=steps", "train.save_steps=10"]
FORTY += ["peft.lora_dropout=0.1"]


def start_sweep(command: list[str], folder: Path, output: TextIO) -> Process:
    """Start a sweep of two jobs in a session of its own, and return when both have a checkpoint."""
    arguments = ["-m", "lora_exp", *command]
    process = Process(*arguments, cwd=folder, stdout=output, stderr=output, new_session=True)
    while len(list(folder.glob("multirun/*/*/[01]/checkpoints/checkpoint-*"))) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the adapters of two runs alone, by job."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for job, rank in enumerate((2, 4)):
        run(compose(f"peft.r={rank}", *FORTY), folder / str(job))
    return adapter_hashes(folder)


def test_a_sweep_whose_worker_is_killed_has_the_same_results(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    command = ["-m", "peft.r=2,4", *FORTY]
    with (tmp_path / "err").open("w") as output:
        process = start_sweep(command, tmp_path, output)
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        os.kill(int(Path(children).read_text().split()[0]), signal.SIGKILL)
        assert process.wait() == 0
    assert "killed by SIGKILL" in (tmp_path / "err").read_text()
    sweep, jobs = read_summary(tmp_path)
    assert {job["status"] for job in jobs.values()} == {"finished"}
    assert adapter_hashes(sweep) == uninterrupted


def test_a_worker_that_is_asked_to_stop_while_it_retries_a_job_ends_the_sweep(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    command = ["-m", "peft.r=2,4", *FORTY, "hydra.sweep.dir=multirun/a/b"]
    with (tmp_path / "err").open("w") as output:
        process = start_sweep(command, tmp_path, output)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        while (tmp_path / "err").read_text().count("goes on from step") < 2:  # the last job
            time.sleep(0.02)
            assert process.poll() is None
        os.kill(int(children.read_text().split()[0]), signal.SIGTERM)
        assert process.wait(60) == 75
    done = cli("resume=multirun/a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert adapter_hashes(tmp_path / "multirun/a/b") == uninterrupted


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupted_sweep_saves_every_job_and_resumes_by_its_directory(
    whole_group: bool, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    command = ["-m", "peft.r=2,4", *FORTY, "hydra.sweep.dir=multirun/a/b"]
    with (tmp_path / "err").open("w") as output:
        process = start_sweep(command, tmp_path, output)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends
        else:
            os.kill(process.pid, signal.SIGTERM)  # what a scheduler sends
        assert process.wait() == 75
    sweep = tmp_path / "multirun/a/b"
    records = [json.loads((sweep / n / "run.json").read_text()) for n in "01"]
    assert [record["status"] for record in records] == ["interrupted"] * 2
    rows = {row["job"]: row["status"] for row in json.loads((sweep / "summary.json").read_text())}
    assert rows == {"0": "interrupted", "1": "interrupted"}
    stderr = (tmp_path / "err").read_text()
    assert "Traceback" not in stderr
    assert stderr.count("saving at the next step") == 1
    assert "resume=multirun/a/b goes on" in stderr
    done = cli("resume=multirun/a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert adapter_hashes(sweep) == uninterrupted


def test_a_resumed_sweep_retries_failed_jobs_only_when_asked(tmp_path: Path) -> None:
    command = ["-m", *STEPS, "train.learning_rate=1e-3,1e30", "hydra.sweep.dir=multirun/a/b"]
    command += ["train.warmup_steps=0", "train.max_grad_norm=0"]
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 1
    sweep = tmp_path / "multirun/a/b"
    before = [(sweep / n / "run.json").read_bytes() for n in "01"]
    assert json.loads(before[1])["status"] == "diverged"
    done = cli("resume=multirun/a/b", cwd=tmp_path)
    assert done.returncode == 1
    assert "diverged before, not run again; retry_failed=true does" in done.stdout
    assert [(sweep / n / "run.json").read_bytes() for n in "01"] == before
    rows = json.loads((sweep / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    done = cli("resume=multirun/a/b", "retry_failed=true", cwd=tmp_path)
    assert done.returncode == 1
    after = [(sweep / n / "run.json").read_bytes() for n in "01"]
    assert after[0] == before[0]
    assert json.loads(after[1])["resumed"][0]["status"] == "diverged"


def test_two_launches_do_not_share_a_sweeps_directory(tmp_path: Path) -> None:
    command = ["-m", "peft.r=2,4", *FORTY, "hydra.sweep.dir=multirun/a/b"]
    with (tmp_path / "err").open("w") as output:
        process = start_sweep(command, tmp_path, output)
        process.send_signal(signal.SIGSTOP)  # so that it still runs when the second starts
        multirun = (tmp_path / "multirun/a/b/multirun.yaml").read_bytes()
        second = cli(*command, "seed=7", cwd=tmp_path)
        process.send_signal(signal.SIGCONT)
        assert (tmp_path / "multirun/a/b/multirun.yaml").read_bytes() == multirun
        assert second.returncode == 1
        assert f"multirun/a/b is in use by process {process.pid} on" in second.stderr
        assert process.wait() == 0


def file_contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


REFUSED = {
    "job 1: ": [["peft.r=2,8"], ["peft.r=2,4", "seed=7"], ["peft.r=0,-1"]],
    "peft.rr: no such key": [["peft.rr=2,4"]],
    "quant: there is no 'nf5'": [["quant=none,nf5"]],
    "a folder's name has 300 bytes": [["peft.r=2,4", f"hydra.sweep.subdir={'x' * 300}"]],
}


def test_a_refused_sweep_leaves_existing_files_unchanged(tmp_path: Path) -> None:
    command = ["-m", *STEPS, "hydra.sweep.dir=multirun/a/b"]
    assert cli(*command, "peft.r=2,4", cwd=tmp_path).returncode == 0
    before = file_contents(tmp_path / "multirun/a/b")
    for message, refused in ((m, overrides) for m, many in REFUSED.items() for overrides in many):
        done = cli(*command, *refused, cwd=tmp_path)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert message in done.stderr
        assert file_contents(tmp_path / "multirun/a/b") == before


def test_a_faulty_job_leaves_the_run_in_its_directory_unchanged(tmp_path: Path) -> None:
    command = ["-m", *STEPS, "hydra.sweep.dir=multirun/a/b"]
    assert cli(*command, "peft.r=2,4", cwd=tmp_path).returncode == 0
    sweep = tmp_path / "multirun/a/b"
    before = file_contents(sweep / "1")
    done = cli(*command, "peft.r=2,0", cwd=tmp_path)
    assert done.returncode == 1
    assert "job 1: peft.r: 0 is not a rank" in done.stdout
    assert file_contents(sweep / "1") == before
    assert {r["overrides"]["peft.r"]: r["status"] for r in read_rows(sweep)} == {
        "2": "finished", "4": "finished",
    }  # fmt: skip
    summary = {job["job"]: job["status"] for job in json.loads((sweep / SUMMARY).read_text())}
    assert summary == {"0": "finished", "1": "failed"}


def test_a_sweep_in_batches_has_a_table_although_one_batch_is_refused(tmp_path: Path) -> None:
    command = ["-m", "peft.r=4,0,8", "hydra.sweeper.max_batch_size=1", *STEPS]
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 1
    _, jobs = read_summary(tmp_path)  # Hydra's sweeper ends at the first batch that fails
    assert {n: job["status"] for n, job in jobs.items()} == {"0": "finished", "1": "failed"}
    assert "job 1: peft.r: 0 is not a rank" in done.stdout.rpartition("status")[2]


def test_a_sweep_of_a_config_of_ones_own_resumes_from_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 7\n")
    command = ["-m", "--config-dir", ".", "--config-name", "mine", "peft.r=2,4"]
    done = cli(*command, *STEPS, "hydra.sweep.dir=multirun/a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "multirun/a/b"
    shutil.rmtree(sweep / "1")
    done = cli("resume=multirun/a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    configs = [(sweep / n / "config.yaml").read_text().splitlines() for n in "01"]
    assert ["seed: 7" in lines for lines in configs] == [True, True]


def test_a_resumed_sweep_keeps_a_job_trained_longer_alone_and_can_be_lengthened(
    tmp_path: Path,
) -> None:
    steps = [*STEPS[:-1], "train.save_strategy=steps", "train.save_steps=3"]
    assert cli("-m", "peft.r=2,4", *steps, "hydra.sweep.dir=a/b", cwd=tmp_path).returncode == 0
    assert cli("resume=a/b/0", "train.max_steps=5", cwd=tmp_path).returncode == 0

    def rows() -> dict[str, Any]:
        return {r["job"]: r for r in json.loads((tmp_path / "a/b/summary.json").read_text())}

    objective = rows()["0"]["objective"]
    done = cli("resume=a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0-1  finished before, not run again" in done.stdout
    assert (rows()["0"]["objective"], rows()["0"]["overrides"]["peft.r"]) == (objective, "2")
    done = cli("resume=a/b", "train.max_steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / f"a/b/{n}/run.json").read_text()) for n in "01"]
    assert [record["steps"] for record in records] == [5, 5]
    assert records[1]["resumed"][0]["changes"]["train.max_steps"] == [3, 5]


def test_each_job_of_a_pack_is_a_run_of_its_own_in_wandb(tmp_path: Path) -> None:
    done = cli("-m", "peft.r=2,4", *STEPS[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep, _ = read_summary(tmp_path)
    earlier_losses: list[str] = []
    for number in ("0", "1"):
        (file,) = (sweep / number / "wandb").glob("offline-run-*/*.wandb")
        command = ["wandb", "leet", "inspect", "--json", str(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = map(json.loads, (sweep / number / "metrics.jsonl").read_text().splitlines())
        losses = [str(line["train/loss"])[:10] for line in lines if "train/loss" in line]
        assert len(losses) == 3
        assert losses[-1] in output  # the jobs' first losses are equal
        assert not any(loss in output for loss in earlier_losses)
        earlier_losses = losses[-1:]


CHANGING_PROCESSOR = """
import os, signal, sys
from lora_exp.lockstep import worker

pack = worker._train_pack

def on_changing_processor(seats, report):
    first = seats.jobs[0].number == 0
    if not first and os.environ.get("DIES") and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    from torch import nn
    from lora_exp.lockstep.verification import Verification
    from tests.lockstep.processors import LINEAR, strided_linear

    def product(x, weight, bias=None):
        many = x.numel() // x.shape[-1] > 250 and product.changed
        return (strided_linear if many else LINEAR)(x, weight, bias)

    def choose(self, context, passed):
        product.changed = self.passes > 6 and first  # these rows' classes are measured by then
        return original(self, context, passed)

    original, Verification.choose = Verification.choose, choose
    product.changed, nn.functional.linear = False, product
    try:
        pack(seats, report)
    finally:
        nn.functional.linear, Verification.choose = LINEAR, original

worker._train_pack = on_changing_processor
from lora_exp.__main__ import main
main()
"""
ONE_SIZE = [*STEPS, "train.max_steps=8", "data.max_rows=4"]
ONE_SIZE += ["train.eval_strategy=no"]


def launch_on_a_changing_processor(
    folder: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "LORA_EXP_CACHE": str(folder / "cache")}
    arguments = ["-c", CHANGING_PROCESSOR, *command, *ONE_SIZE, "lockstep.verify=1"]
    return python(*arguments, cwd=folder, env=os.environ | settings | environment)


def test_jobs_whose_pack_differed_are_trained_again_alone(tmp_path: Path) -> None:
    # the second pack's worker dies at once; the first pack's difference is still handled
    sweep = ["-m", "peft.r=2,4", "model.dtype=float32,bfloat16"]
    done = launch_on_a_changing_processor(tmp_path, *sweep, DIES="1")
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "jobs [0, 2] are not proven equal" in output
    assert "the first layer is layers.0.self_attn.q_proj" in output
    folder, jobs = read_summary(tmp_path)
    kept = sorted(path.name for path in folder.glob("*.not-proven-equal"))
    assert kept == ["0.not-proven-equal", "2.not-proven-equal"]
    places = [json.loads((folder / n / "run.json").read_text())["place"] for n in "02"]
    assert ([jobs[n]["proven"] for n in "02"], places) == ([True, True], ["alone", "alone"])
    (tmp_path / "plain").mkdir()
    basic = cli(*sweep, *ONE_SIZE, "hydra/launcher=basic", cwd=tmp_path / "plain")
    assert basic.returncode == 0
    hashes, expected = adapter_hashes(folder), adapter_hashes(read_summary(tmp_path / "plain")[0])
    assert {n: hashes[n] for n in "0123"} == expected
    assert hashes["2.not-proven-equal"] != expected["2"]  # the adapter that was set aside differs


def test_jobs_whose_pack_differed_meet_again_at_their_rungs(tmp_path: Path) -> None:
    rule = ["early_stopping=halving", "early_stopping.eta=2", "early_stopping.first_rung=0.5"]
    sweep = ["-m", "peft.r=4", "train.learning_rate=3e-4,1e-3,3e-3,1e-2", *rule]
    done = launch_on_a_changing_processor(tmp_path, *sweep)
    assert done.returncode == 0, done.stderr
    records = [
        json.loads((read_summary(tmp_path)[0] / job / "run.json").read_text()) for job in "0123"
    ]
    assert [record["place"] for record in records] == ["alone"] * 4
    assert [record["status"] for record in records] == ["pruned"] * 2 + ["finished"] * 2
    evaluated = [o for o in ONE_SIZE if not o.startswith("train.eval")]
    evaluated += ["train.eval_strategy=steps", "train.eval_steps=4"]
    alone = run(compose("peft.r=4", "train.learning_rate=3e-4", *evaluated), tmp_path / "alone")
    lines = map(json.loads, (alone.directory / "metrics.jsonl").read_text().splitlines())
    (loss,) = (line["eval/loss"] for line in lines if line["step"] == 4 and "eval/loss" in line)
    assert records[0]["rungs"][0]["value"] == loss


def test_jobs_whose_pack_differed_may_be_kept_and_are_marked(tmp_path: Path) -> None:
    done = launch_on_a_changing_processor(
        tmp_path, "-m", "peft.r=2,4", "lockstep.on_difference=keep"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, not proven equal") == 2
    folder, jobs = read_summary(tmp_path)
    assert [job["proven"] for job in jobs.values()] == [False, False]
    assert not list(folder.glob("*.not-proven-equal"))
    longer = ["train.max_steps=9", "tracking=none"]
    continued = cli(f"resume={folder / '0'}", *longer, cwd=tmp_path)
    assert continued.returncode == 0, continued.stderr
    record = json.loads((folder / "0" / "run.json").read_text())
    assert record["lockstep"]["proven"] is False
    assert record["steps"] == 9
    retrain = ["train.max_steps=10", "lockstep.on_difference=retrain"]
    refused = cli(f"resume={folder / '0'}", *retrain, cwd=tmp_path)
    assert "lockstep.on_difference=keep" in refused.stderr + refused.stdout
    assert refused.returncode == 1
    # the same sweep without on_difference=keep trains unproven jobs again
    command = ["-m", "peft.r=2,4", *ONE_SIZE, f"hydra.sweep.dir={folder}"]
    done = cli(*command, cwd=tmp_path)
    assert "not proven equal before, trained again" in done.stdout
    assert [job["proven"] for job in read_summary(tmp_path)[1].values()] == [True, True]
