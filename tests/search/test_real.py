"""Real runs: a search that is killed and resumed, its winner alone, and a W&B agent's command."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lora_exp.search.journal import JOURNAL
from tests.conftest import QUICK, ROOT
from tests.test_main import cli
from tests.warm import Process, python

SHORT = ["tracking=none", *QUICK, "samples.rows=0", "train.save_strategy=no", "data.max_rows=32"]


def adapters(sweep: Path) -> dict[str, str]:
    paths = sorted(sweep.glob("*/adapter/adapter_model.safetensors"))
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_a_killed_search_goes_on_the_same_and_its_winner_alone_is_the_same(tmp_path: Path) -> None:
    command = ["experiment=lr_rank_search", "hydra.sweeper.trials=3", "hydra.sweeper.batch=2"]
    command += SHORT
    whole = cli(*command, "hydra.sweep.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    arguments = ["-m", "lora_exp", *command, "lockstep.max_jobs=1", "hydra.sweep.dir=killed"]
    killed = Process(*arguments, cwd=tmp_path)
    journal = tmp_path / "killed" / JOURNAL
    while not journal.is_file() or journal.read_text().count('"batch":') < 2:
        time.sleep(0.02)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    resumed = cli("resume=killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert journal.read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()
    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")
    assert adapters(tmp_path / "whole").keys() == {"0", "1", "2"}
    rows = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert sorted((row["job"], row["status"]) for row in rows) == [(n, "finished") for n in "012"]

    (best,) = re.findall(r"trial (\d) of 3; eval/loss", whole.stdout)
    assert rows[0]["job"] == best
    (line,) = [line for line in whole.stdout.splitlines() if line.startswith("lora-exp run ")]
    alone = cli(*shlex.split(line)[2:], "hydra.run.dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    saved = (tmp_path / "alone" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(saved).hexdigest() == adapters(tmp_path / "whole")[best]

    refused = cli("resume=killed", "train.max_steps=9", cwd=tmp_path)
    assert "holds another search (train.max_steps: 9, was 3)" in refused.stderr


def test_a_grid_within_a_limit_ends_with_the_front_of_its_runs(tmp_path: Path) -> None:
    objectives = "{eval/loss: minimize, parameters: minimize, bytes: minimize}"
    done = cli(
        "-m", "hydra/sweeper=search", "hydra.sweeper.sampler=grid", "peft.r=2,64,4",
        "hydra.sweeper.max_parameters=60000", f"hydra.sweeper.objectives={objectives}",
        *SHORT, "train.max_steps=1", "hydra.sweep.dir=limited", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 trials; max_parameters=60000: 1 of 3 cells are left out" in done.stdout
    assert re.search(r"Pareto front, [12] of 2 trials", done.stdout)
    lines = (tmp_path / "limited" / JOURNAL).read_text().splitlines()
    trials = [json.loads(line) for line in lines[2:]]
    assert [t["others"]["parameters"] for t in trials] == [29_184, 58_368]  # as the runs counted
    assert 10**6 < trials[0]["others"]["bytes"] < trials[1]["others"]["bytes"]


def test_the_example_for_a_wandb_agent_runs_as_the_agent_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    assert {str(word) for word in sweep["metric"].values()} == {"eval/loss", "minimize"}
    low, high = (sweep["parameters"]["train.learning_rate"][end] for end in ("min", "max"))
    assert isinstance(low, float)
    assert isinstance(high, float)
    first = {key: spec.get("values", [low])[0] for key, spec in sweep["parameters"].items()}
    values = create_sweep_command_args({"args": {k: {"value": v} for k, v in first.items()}})
    values |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words = create_sweep_command(list(sweep["command"]))
    command = [part for word in words for part in values.get(word.strip("${}"), [word])]
    assert command[:3] == ["/usr/bin/env", "python", "run.py"]
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    done = python(str(ROOT / command[2]), *command[3:], *QUICK, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/*/*/run.json")
    record = json.loads(path.read_text())
    assert (record["tracking_id"], record["objective"]) == ("agent123", sweep["metric"]["name"])
