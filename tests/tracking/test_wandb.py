"""Data that W&B gets, read from real offline files, and data that it never gets."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose, experiment, run
from lora_exp.errors import Interrupted
from lora_exp.tracking.wandb import _shortened
from tests.conftest import QUICK, ROOT
from tests.test_experiment import mark_killed
from tests.warm import python


def offline_run(overrides: list[str], directory: Path, sweep: str | None = None) -> Any:
    return run(compose(*QUICK, "train.logging_steps=1", *overrides), directory, sweep)


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Read the records of the newest offline run with W&B's own reader."""
    path = sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]], Path]:
    directory = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_API_KEY", "canary-environment-1")
        patch.setattr(sys, "argv", ["run.py", "canary-argv-1"])
        words = ["peft.r=4", "targets=qv", "tracking.system=true"]
        result = offline_run(words, directory, "day/time")
    return result, read_records(directory), directory


def test_name_group_tags_config_and_artifact_are_logged(tracked_run: Any) -> None:
    result, records, _ = tracked_run
    (wandb_run,) = (record["run"] for record in records if record["type"] == "run")
    assert wandb_run["display_name"].startswith("r4-qv")
    assert (wandb_run["run_group"], wandb_run["job_type"]) == ("day/time", "sft")
    assert {"peft=lora", "targets=qv", "quant=none", "model=tiny"} <= set(wandb_run["tags"])
    config = wandb_run["config"]["update"]
    assert (config["peft"]["r"], config["peft"]["target_modules"]) == (4, "qv")
    record = json.loads((result.directory / "run.json").read_text())
    assert wandb_run["run_id"] == record["tracking_id"]
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert f"adapter-{wandb_run['run_id']}" in {artifact["name"] for artifact in artifacts}


def test_every_metric_has_its_step(tracked_run: Any) -> None:
    result, records, _ = tracked_run
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    losses = {item["_step"]: item["train/loss"] for item in history if "train/loss" in item}
    assert list(losses) == [1, 2, 3]
    assert losses[3] == result.metrics["train/loss"]
    assert history[0]["_step"] == 0  # the base, before training
    assert history[0]["before/loss"] == result.metrics["before/loss"]
    assert "eval/loss" not in history[0]  # it would squeeze the chart


def test_the_summary_has_counts_times_and_memory(tracked_run: Any) -> None:
    result, records, _ = tracked_run
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert summary["trainable_parameters"] == 12_288
    expected = {"before/exact_match", "eval/exact_match", "train/seconds", "peak_bytes", "seconds"}
    assert expected <= set(summary)
    assert summary["eval/loss"] == result.metrics["eval/loss"] == summary["objective"]
    assert summary["train/loss_min"] == min(losses_of(records).values())
    assert summary["eval/exact_match_mirror"] == 0  # of one task


def losses_of(records: list[dict[str, Any]]) -> dict[int, float]:
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {item["_step"]: item["train/loss"] for item in history if "train/loss" in item}


def test_charts_have_steps_and_tokens_as_axes(tracked_run: Any) -> None:
    _, records, _ = tracked_run
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    trained = [item for item in history if "train/loss" in item]
    assert [item["train/global_step"] for item in trained] == [1, 2, 3]
    tokens = [item["train/tokens"] for item in trained]
    assert sorted(set(tokens)) == tokens
    assert tokens[0] > 0
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {m["glob_name"]: m.get("step_metric") for m in metrics if "glob_name" in m}
    assert axes["train/*"] == axes["eval/*"] == "train/global_step"


def test_what_was_really_used_is_in_the_config(tracked_run: Any) -> None:
    result, records, _ = tracked_run
    updates = [record["config"]["update"] for record in records if record["type"] == "config"]
    facts = next(update["run"] for update in updates if "run" in update)
    record = json.loads((result.directory / "run.json").read_text())
    assert facts["place"] == "alone"
    assert facts["precision"] == record["precision"]
    dtypes = {"base": "float32", "computed_in": "float32", "trained": "float32"}
    assert record["precision"] == dtypes
    for key in ("fingerprint", "versions", "data", "base"):
        assert facts[key] == record[key]


def test_a_pack_of_named_jobs_is_told_apart_from_runs_alone(tmp_path: Path) -> None:
    words = [*QUICK, "samples.rows=0", "sweep_name=ranks", "tracking.mode=offline"]
    modules = "peft.target_modules=[q_proj],[k_proj,v_proj]"
    folder = f"hydra.sweep.dir={tmp_path}"
    done = python("run.py", "-m", *words, modules, folder)
    assert done.returncode == 0, done.stderr
    runs = []
    for number in "01":
        records = read_records(tmp_path / number)
        (run_record,) = (record["run"] for record in records if record["type"] == "run")
        updates = [record["config"]["update"] for record in records if record["type"] == "config"]
        assert any(u.get("run", {}).get("place") == "lockstep, exact" for u in updates)
        assert run_record["run_group"] == "ranks"
        summary = json.dumps([record for record in records if record["type"] == "summary"])
        assert "pack_peak_bytes" in summary
        assert '"peak_bytes"' not in summary
        runs.append(run_record)
    assert {"targets=q_proj"} < set(runs[0]["tags"])
    assert runs[1]["config"]["update"]["choices"]["targets"] == "k_proj,v_proj"
    assert runs[0]["display_name"] != runs[1]["display_name"]


def test_no_environment_arguments_paths_or_code_are_sent(tracked_run: Any) -> None:
    _, _, directory = tracked_run
    forbidden = ["canary-environment-1", "canary-argv-1", str(ROOT)]
    forbidden += ["def job(", *([host] if len(host := socket.gethostname()) > 4 else [])]
    for path in (directory / "wandb").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            leaked = [word for word in forbidden if word.encode() in data]
            assert not leaked, f"{path}: {leaked}"
    assert getpass.getuser()  # the user's name may be a common word, so only metadata is checked
    names = {path.name for path in directory.rglob("*")}
    assert not {"wandb-metadata.json", "requirements.txt", "output.log"} & names


def test_the_samples_are_a_table_of_before_and_after(tracked_run: Any) -> None:
    _, _, directory = tracked_run
    (path,) = directory.rglob("samples_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["prompt", "task", "expected", "before", "after"]
    assert len(table["data"]) == 4


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path: Path) -> None:
    settings = ["train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=5"]
    first = offline_run(settings, tmp_path)
    for path in sorted((tmp_path / "checkpoints" / "checkpoint-3").rglob("*"), reverse=True):
        path.unlink()
    (tmp_path / "checkpoints" / "checkpoint-3").rmdir()
    mark_killed(first.directory)
    run(compose(f"resume={first.directory}"))
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # the name holds the run's id
    assert '"train/loss"' in json.dumps(read_records(tmp_path))


LOSING = """
import glob, os, signal, sys
from pathlib import Path
from lora_exp.tracking.tracker import RunInfo
from lora_exp.tracking import wandb
from lora_exp.tracking.wandb import Wandb

wandb.MEMORY = 100  # bytes: the rest is in a file

def end_service():
    for file in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        for child in open(file).read().split():
            os.kill(int(child), signal.SIGTERM)
            os.waitpid(int(child), 0)

runs = []
for name in ("one", "two"):
    info = RunInfo(Path(name), name, name, None, "sft", [], {"seed": 1})
    runs.append(Wandb(None, None, "offline", None, False, run=info))
for step in range(1, 6):
    for run in runs:
        run.log({"train/loss": 1 / step, "train/global_step": step}, step)
    if step == 1:
        runs[0].describe({"place": "alone"})
    if step in (3, 4):
        end_service()
end_service()
for run in runs:
    run.finish({"eval/loss": 0.5}, None, "finished")
"""


def test_runs_whose_wandb_process_is_ended_by_a_signal_are_sent_again(tmp_path: Path) -> None:
    """Of some schedulers SIGTERM reaches all processes of a job."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_SERVICE", None)  # W&B's process of this one
    command = [sys.executable, "-c", LOSING]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B's process has ended") == 3
    assert "Traceback" not in done.stderr
    for name in ("one", "two"):
        records = read_records(tmp_path / name)
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert [(i["_step"], i["train/loss"]) for i in items] == [(n, 1 / n) for n in range(1, 6)]
        assert ("alone" in json.dumps(records)) == (name == "one")
        assert [record["type"] for record in records].count("exit") == 1
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*"))) == 1


def test_a_pruned_run_is_finished_and_tagged(tmp_path: Path) -> None:
    rule = ["early_stopping=threshold", "early_stopping.upper=1", "samples.rows=0"]
    offline_run([*rule, "train.eval_strategy=steps", "train.eval_steps=1"], tmp_path)
    records = read_records(tmp_path)
    tags = [record["run"]["tags"] for record in records if record["type"] == "run"]
    assert "pruned" in tags[-1]
    assert {"peft=lora", "early_stopping=threshold"} <= set(tags[-1])
    (end,) = (record["exit"] for record in records if record["type"] == "exit")
    assert not end.get("exit_code")


def test_an_interrupted_run_is_not_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(experiment, "train_to_end", interrupt)
    with pytest.raises(Interrupted):
        offline_run(["samples.rows=0", "data.max_eval_rows=2"], tmp_path)
    (end,) = (record["exit"] for record in read_records(tmp_path) if record["type"] == "exit")
    assert end["exit_code"] == 255


def test_without_tracking_there_are_no_wandb_files(quick_run: Callable[..., Any]) -> None:
    assert not (quick_run().directory / "wandb").exists()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An API key, and a server that cannot be reached."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_without_a_network_two_runs_are_quickly_logged_offline(
    unreachable: None, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom lora_exp import compose, run\n"
        f"for n in '12': run(compose(*{[*QUICK, 'samples.rows=0']!r}), sys.argv[1] + n)"
    )
    start = time.perf_counter()
    done = python("-c", code, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be reached") == 1
    assert time.perf_counter() - start < 80
    for n in "12":
        assert read_records(tmp_path / f"run{n}")


@pytest.fixture
def quick_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def with_environment(**environment: str) -> Callable[..., Any]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return lambda *overrides: offline_run(["samples.rows=0", *overrides], tmp_path / "run")

    return with_environment


def test_environment_variables_of_wandb_are_used(
    quick_wandb: Callable[..., Any], tmp_path: Path
) -> None:
    tracked_quick_run = quick_wandb(
        WANDB_PROJECT="theirs", WANDB_TAGS="one, ,two", WANDB_RUN_GROUP="g" * 200
    )
    tracked_quick_run("tracking.tags=[2024]", "tracking.name=mine")
    (wandb_run,) = (
        record["run"] for record in read_records(tmp_path / "run") if record["type"] == "run"
    )
    assert (wandb_run["project"], wandb_run["display_name"]) == ("theirs", "mine")
    assert {"one", "two", "2024", "peft=lora"} <= set(wandb_run["tags"])
    assert len(wandb_run["run_group"]) == 128


def test_wandb_prints_nothing_of_its_own_offline(
    quick_wandb: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    quick_wandb(WANDB_MODE="offline")()
    captured = capfd.readouterr()
    assert "WARNING" not in captured.err
    assert "offline; to send it: lora-exp sync " in captured.out


def test_a_disabled_wandb_logs_and_prints_nothing(
    quick_wandb: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_wandb(WANDB_MODE="disabled")()
    assert not list((tmp_path / "run").glob("wandb/*run*"))
    assert "lora-exp sync" not in capsys.readouterr().out


def test_the_run_id_of_an_agent_is_used(quick_wandb: Callable[..., Any], tmp_path: Path) -> None:
    quick_wandb(WANDB_RUN_ID="trial7")()
    assert json.loads((tmp_path / "run/run.json").read_text())["tracking_id"] == "trial7"
    (wandb_run,) = (
        record["run"] for record in read_records(tmp_path / "run") if record["type"] == "run"
    )
    assert wandb_run["run_id"] == "trial7"


def run_code(code: str, folder: Path, **environment: str) -> str:
    """Run code in a process of its own, since W&B keeps its settings, and return its output."""
    command = [
        sys.executable,
        "-c",
        f"from lora_exp.tracking.wandb import _init_run, report_trial; {code}",
        "canary-argv",
    ]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"HOME": str(folder)} | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_mean_of_a_trials_runs_is_logged_without_arguments_host_or_packages(
    tmp_path: Path,
) -> None:
    code = "report_trial({'WANDB_RUN_ID': 'trial8'}, 'eval/loss', [1.0, 2.0])"
    assert run_code(code, tmp_path, WANDB_MODE="offline") == ""
    assert '"eval/loss": 1.5' in json.dumps(read_records(tmp_path))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary-argv" not in written
    host = socket.gethostname()
    assert len(host) < 5 or host.encode() not in written
    assert not list(tmp_path.rglob("requirements.txt"))


def test_a_mode_that_needs_a_key_says_so(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501: it is reachable
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    output = run_code("_init_run('online', {})", tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="")
    server.shutdown()
    server.server_close()
    assert "ConfigError: tracking: W&B: No API key configured" in output
    assert output.endswith("or give tracking.mode=offline\n")


def test_long_group_names_with_equal_beginnings_stay_different() -> None:
    first, second = (_shortened("sweep/" + "x" * 200 + end, 128) for end in "ab")
    assert first != second
    assert {len(first or ""), len(second or "")} == {128}
    assert _shortened("day/time", 128) == "day/time"
