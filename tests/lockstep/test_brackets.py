"""A sweep that stops its losers: the same verdicts wherever its jobs train, and the same bytes."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from lora_exp import compose, run
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.early_stopping.rules import Halving
from lora_exp.lockstep.brackets import (
    bracket_values,
    brackets,
    brackets_of,
    earlier_jobs,
    forecasts,
    stopped_before,
)
from lora_exp.lockstep.plan import Job
from tests.conftest import QUICK
from tests.lockstep.runs import COMMON, run_alone, run_packed
from tests.test_main import cli
from tests.warm import Process

HALVING = ["early_stopping=halving", "early_stopping.eta=2", "early_stopping.first_rung=0.25"]
STEPS = ["tracking=none", *QUICK, "samples.rows=0", "train.logging_steps=1", "train.max_steps=8"]
STEPS += ["train.save_strategy=no", "peft.r=4"]


def read_records(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(sweep.glob("*/run.json"))]


def losses(directory: Path) -> list[Any]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def test_a_pruned_job_is_the_run_alone_up_to_its_last_step_and_the_winner_is_it(
    tmp_path: Path,
) -> None:
    jobs = [[f"train.learning_rate={rate}"] for rate in ("1e-4", "3e-3", "1e-3")]
    steps = ["train.max_steps=8", "train.eval_strategy=no"]
    bracket = Bracket(Halving(eta=2, first_rung=0.25, keep=False), False, frozenset(range(3)))
    results, pack = run_packed(jobs, tmp_path / "pack", *HALVING, *steps, bracket=bracket)
    assert pack.passes.report()["shared_backward_passes"] >= 1
    loser, winner, _ = results
    record = json.loads((loser.directory / "run.json").read_text())
    assert record["status"] == "pruned"
    assert record["stopped"]["reason"] == "3 of 3 at step 2"
    assert record["steps"] == 2
    assert loser.objective == record["stopped"]["value"] == record["rungs"][0]["value"]
    assert loser.saved is None
    assert not (loser.directory / "adapter").exists()
    alone = run_alone(jobs[:2], tmp_path / "alone", *steps)
    assert losses(loser.directory) == losses(alone[0].directory)[:2]
    name = "adapter_model.safetensors"
    assert (winner.saved / name).read_bytes() == (alone[1].saved / name).read_bytes()


def test_jobs_of_a_pack_and_jobs_alone_meet_at_rungs_even_if_the_sweep_is_killed(
    tmp_path: Path,
) -> None:
    command = ["-m", "peft=lora,dora", "train.learning_rate=1e-4,3e-3", *STEPS, *HALVING]
    sweep = tmp_path / "a/b"
    with (tmp_path / "out").open("w") as output:
        arguments = ["-m", "lora_exp", *command, "hydra.sweep.dir=a/b"]
        process = Process(*arguments, cwd=tmp_path, stdout=output, stderr=output, new_session=True)
        while not any(r["status"] == "paused" for r in read_records(sweep)):
            time.sleep(0.02)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = cli("resume=a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 after 25% of the steps, 1 after 50%" in done.stdout
    records = read_records(sweep)
    assert sorted(r["status"] for r in records) == ["finished"] + ["pruned"] * 3
    live = list(range(4))
    for rung, step in enumerate((2, 4)):
        reports = {job: records[job]["rungs"][rung] for job in live}
        order = sorted(live, key=lambda job: (reports[job]["value"], job))
        assert [(reports[job]["step"], reports[job]["rank"]) for job in order] == [
            (step, rank + 1) for rank in range(len(live))
        ]
        live = order[: len(live) // 2]
    (best,) = live
    assert [r["status"] for r in records].index("finished") == best
    peft, rate = ("lora", "dora")[best // 2], ("1e-4", "3e-3")[best % 2]
    alone = run(compose(f"peft={peft}", f"train.learning_rate={rate}", *STEPS), tmp_path / "alone")
    saved = sweep / str(best) / "adapter" / "adapter_model.safetensors"
    assert saved.read_bytes() == (alone.saved / saved.name).read_bytes()
    rows = json.loads((sweep / "summary.json").read_text())
    assert rows[0]["job"] == str(best)
    assert [row["stopped"]["step"] for row in rows[1:]] == [4, 2, 2]
    again = cli("resume=a/b", cwd=tmp_path)
    assert again.stdout.count("stopped early before, not run again") == 1
    assert stopped_before(plan_jobs(sweep, *HALVING)) == set(range(4)) - {best}
    earlier = earlier_jobs(sweep, 4)
    cfg = earlier[0].settled
    by_job = brackets([*earlier, Job(4, cfg, cfg, sweep / "4")], {})  # type: ignore[arg-type]
    assert [numbers for numbers, _ in forecasts(by_job, 4)] == [[4]]
    assert "compared with 4 earlier jobs" in forecasts(by_job, 4)[0][1]
    assert sorted(by_job[4].values) == [0, 1, 2, 3]
    loser = min(set(range(4)) - {best})
    record = records[loser] | {"data": dict.fromkeys(records[loser]["data"], "sha256:other")}
    (sweep / str(loser) / "run.json").write_text(json.dumps(record))  # its rows have changed
    assert loser not in stopped_before(plan_jobs(sweep, *HALVING))
    later = plan_jobs(sweep, "early_stopping.eta=2", "early_stopping.first_rung=0.5")
    assert stopped_before(later) == set()  # none was measured there: all train on


def plan_jobs(sweep: Path, *overrides: str) -> list[Job]:
    jobs = []
    for n in range(4):
        peft, rate = ("lora", "dora")[n // 2], ("1e-4", "3e-3")[n % 2]
        cfg = compose(
            "early_stopping=halving",
            f"peft={peft}",
            f"train.learning_rate={rate}",
            *STEPS,
            *overrides,
        )
        jobs.append(Job(n, cfg, cfg, sweep / str(n)))
    return jobs


def test_reports_of_another_length_or_other_rungs_do_not_count(tmp_path: Path) -> None:
    cfg = compose(*STEPS, "early_stopping=halving", "train.warmup_steps=0")
    job = Job(0, cfg, cfg, tmp_path)
    report = {"rung": 0, "step": 2, "steps": 8, "value": None}  # rungs of eta=2; of eta=3: 1, 3
    late = {"rung": 1, "step": 3, "steps": 8, "measured": False}
    (tmp_path / "run.json").write_text(json.dumps({"rungs": [report, late]}))
    (tmp_path / "config.yaml").write_text("train: {max_steps: 8}\n")
    assert brackets([job], {})[0].values == {0: {1: None}}
    report["step"] = 1
    (tmp_path / "run.json").write_text(json.dumps({"rungs": [report]}))
    assert math.isnan(brackets([job], {})[0].values[0][0] or 0)
    (tmp_path / "config.yaml").write_text("train: {max_steps: 4}\n")  # raised since
    assert brackets([job], {})[0].values == {}


def test_brackets_are_the_same_after_a_way_through_json() -> None:
    cfg = compose(*STEPS, "early_stopping=halving", "train.warmup_steps=0")
    jobs = [Job(n, cfg, cfg, Path("none")) for n in range(3)]
    before = brackets(jobs, {1: True})
    before[0].note(0, 0, 0.5)
    before[0].note(2, 0, None)
    before[0].note(2, 1, math.inf)
    values = json.loads(json.dumps(bracket_values({2: before[2]})))
    refused = Job(0, cfg, None, Path("none"))  # on this machine: its data is not there, say
    after = brackets_of([refused, *jobs[2:]], values)  # of a share that has two of the jobs
    assert list(after) == [2]
    assert after[2] == before[2]
    assert after[2].live(1) == before[2].live(1)


def test_jobs_with_other_rules_or_objectives_are_not_compared() -> None:
    overrides = [[], ["seed=1"], ["early_stopping.eta=2"], ["early_stopping=none"],
                 ["early_stopping=patience"], ["objective=eval/mean_token_accuracy",
                                               "goal=maximize"]]  # fmt: skip
    configs = [compose(*COMMON, "early_stopping=halving", "train.max_steps=90", *o)
               for o in overrides]  # fmt: skip
    jobs = [Job(n, cfg, cfg, Path("none")) for n, cfg in enumerate(configs)]
    by_job = brackets(jobs, {})
    assert [sorted(b.jobs) for b in by_job.values()] == [[0, 1], [0, 1], [2], [5]]
    assert by_job[5].maximize
    assert [numbers for numbers, _ in forecasts(by_job)] == [[0, 1], [2], [5]]
