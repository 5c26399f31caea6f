"""The runner's command line, in separate processes; the first three start Python anew."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.__main__ import _sweep_command
from lora_exp.record.sweep import SweepTable, read_rows
from tests.conftest import QUICK, ROOT
from tests.warm import Process, python


def cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = [str(ROOT / "run.py")] if cwd == ROOT else ["-m", "lora_exp"]
    return python(*program, *arguments, cwd=cwd)


def started_anew(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--cfg=job", "lora_alpha: 32"), ("peft=lroa", "mean lora"), ("peft.r=0", "0 is not a rank")],
)
def test_showing_and_refusing_a_config_import_no_torch(
    argument: str, message: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from lora_exp.__main__ import main\n"
        "heavy = {'torch', 'transformers', 'wandb', 'rich', 'pyarrow'}\n"
        "try: main()\n"
        "finally: assert not heavy & set(sys.modules)"
    )
    done = started_anew("-c", code, argument, cwd=tmp_path)
    assert "AssertionError" not in done.stderr
    assert message in done.stdout + done.stderr


def test_help_shows_commands_groups_and_values() -> None:
    output = started_anew("run.py", "--help").stdout
    assert "python run.py -m peft.r=8,16,32" in output
    assert "quant: fp4, int8, nf4, none" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["peft.r=0", "+peft.lora_alpa=1"], "ConfigError: 2 faults\n  peft.lora_alpa: "),
        (["peft=lroa"], "did you mean lora"),
        (["peft.lora_alpa=1"], "did you mean lora_alpha"),
        (["sead=1"], "did you mean seed"),
        (["peft=none", "peft.r=8"], "peft.r: exists with another option of peft"),
        (["targets=[q_proj]"], "peft.target_modules=[q_proj,v_proj]"),
        (["resume=nowhere"], "ConfigError: resume: no run in nowhere"),
        (["resume=0"], "ConfigError: resume: no run in 0"),  # a job of the sweep in this folder
        (["-m", "--cfg", "job", "seed=1,2"], "ConfigError: --cfg: shows one run; leave out -m"),
        (["-cn", "nothing"], "--config-name: there is no such config"),
        (["data.path=mine.jsonl"], "data.path: data=demo holds out its own rows; give data=jsonl"),
        (["algorithm=grpo", "algorithm.rewards=3"], "algorithm.rewards: is a list; give"),
        (["algorithm.metrics=loss"], "algorithm.metrics: is a list; give algorithm.metrics=[...]"),
        (["hydra.sweeper.params={peft.r: '4,8'}"], "hydra.sweeper.params: cannot take this value"),
        (["trian.max_steps=3"], "trian.max_steps: no such key (did you mean train"),
    ],
)
def test_a_wrong_command_gets_one_clear_error(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = cli(*arguments, f"hydra.run.dir={tmp_path}/run", "hydra.output_subdir=null")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    assert "full_key" not in done.stderr


def test_a_run_works_in_an_empty_folder(tmp_path: Path) -> None:
    words = [*QUICK, "peft.r=4", "tracking=none", "hydra.launcher.executor=slurm"]
    done = started_anew("-m", "lora_exp", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = "hydra.launcher.executor=slurm is for sweeps (-m): this trains here"
    assert expected in done.stdout + done.stderr
    (directory,) = (tmp_path / "outputs").glob("*/*")
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"
    assert (directory / ".hydra" / "overrides.yaml").is_file()
    assert "rank 4" in (directory / "run.log").read_text()


def test_a_resumed_sweep_takes_another_rule_without_the_values_of_the_first(
    tmp_path: Path,
) -> None:
    launched = ["-m", "peft.r=2,4", "early_stopping=halving", "early_stopping.eta=2"]
    (tmp_path / "sweep.json").write_text(json.dumps(launched))
    folder = f"hydra.sweep.dir='{tmp_path}'"
    resume = f"resume={tmp_path}"
    same = _sweep_command([resume, "early_stopping.eta=4"])
    assert same == [*launched[:3], folder, "early_stopping.eta=4"]
    other = _sweep_command([resume, "early_stopping=none"])
    assert other == ["-m", "peft.r=2,4", folder, "early_stopping=none"]


def test_no_secret_of_the_command_line_reaches_a_file(tmp_path: Path) -> None:
    secret = "canary-command-line"
    done = cli("-m", "peft.r=2,4", f"+train.hub_token={secret}", cwd=tmp_path)
    assert "train.hub_token: is a secret" in " ".join(done.stdout.split())
    assert list(tmp_path.rglob("overrides.yaml"))
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
    assert not holding


@pytest.mark.parametrize("mistake", ["peft.rr=2,4", "quant=none,nf5"])
def test_no_secret_stays_in_a_file_when_no_job_begins(tmp_path: Path, mistake: str) -> None:
    secret = "hf_" + "a1B2" * 8
    done = cli("-m", f"tracking.project={secret}", mistake, cwd=tmp_path)
    assert done.returncode == 1
    (multirun,) = tmp_path.glob("multirun/*/*/multirun.yaml")
    assert "tracking.project=<redacted>" in multirun.read_text()
    assert secret not in multirun.read_text()


def test_a_sweep_writes_a_directory_per_job_and_a_table_and_survives_a_failure(
    tmp_path: Path,
) -> None:
    done = cli(
        "-m", "peft.r=2,0,4", *QUICK, "report=report.html", "tracking=wandb", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 1
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    summary = json.loads((sweep / "summary.json").read_text())
    assert [row["status"] for row in summary] == ["finished", "finished", "failed"]
    assert summary[0]["objective"] <= summary[1]["objective"]
    assert "peft.r: 0 is not a rank" in summary[2]["error"]
    with (sweep / "summary.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert {row["name"][:2] for row in table[:2]} == {"r2", "r4"}
    assert float(table[0]["eval/loss"]) == summary[0]["objective"]
    assert all((sweep / n / "adapter" / "README.md").is_file() for n in ("0", "2"))
    assert "peft.r: 0 is not a rank" in (sweep / "1" / "run.log").read_text()
    assert "1 of 3 jobs failed" in done.stderr
    assert "is not a rank" not in done.stderr
    assert "summary.csv" in done.stdout
    assert done.stdout.rindex("finished") < done.stdout.rindex("failed")
    assert "job 1: peft.r: 0 is not a rank" in done.stdout
    assert "eval/loss" in done.stdout
    report = (sweep / "report.html").read_text(encoding="utf-8")
    assert "has the lowest eval/loss" in report
    assert f"report: {sweep.relative_to(tmp_path)}/report.html" in done.stdout


def test_a_preset_sweeps_without_a_flag(tmp_path: Path) -> None:
    done = cli(
        "experiment=module_sweep", "hydra.sweeper.params.targets='qv,mlp'", *QUICK,
        "tracking=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    jobs = json.loads((sweep / "summary.json").read_text())
    assert {job["overrides"]["targets"] for job in jobs} == {"qv", "mlp"}


def test_simultaneous_launches_have_different_directories(tmp_path: Path) -> None:
    started = [Process("-m", "lora_exp", "peft.r=0", cwd=tmp_path) for _ in range(20)]
    assert {"0 is not a rank" in process.communicate()[1] for process in started} == {True}
    assert {process.returncode for process in started} == {1}
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 20


def test_a_refused_command_leaves_existing_files_unchanged(tmp_path: Path) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    (run / ".hydra").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / ".hydra" / "overrides.yaml").write_text("- peft.r=8\n")
    done = cli("hydra.run.dir=run", "peft.r=4", cwd=tmp_path)
    assert done.returncode == 1
    assert "hydra.run.dir: run holds a run already; resume=run, or another" in done.stderr
    assert (run / ".hydra" / "overrides.yaml").read_text() == "- peft.r=8\n"
    sweep.mkdir()
    (sweep / "sweep.json").write_text('["-m", "peft.r=8,16"]')
    (sweep / "summary.csv").write_text("kept")
    done = cli("resume=sweep", "train.learning_rate=1e-3", cwd=tmp_path)
    assert done.returncode == 1
    assert "train.learning_rate: a sweep is resumed as it was launched" in done.stderr
    assert sorted(path.name for path in sweep.iterdir()) == ["summary.csv", "sweep.json"]
    assert (sweep / "summary.csv").read_text() == "kept"


def test_a_reward_that_fails_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(completions, **_):\n    return [1 / 0]\n")
    overrides = [
        "algorithm=grpo",
        "algorithm.rewards=[mine.reward]",
        "trusted_targets=[mine.reward]",
    ]
    overrides += ["experiment=demo_grpo", "tracking=none", "hydra.run.dir=run", "train.max_steps=1"]
    done = cli(*overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert "RewardError: reward" in done.stderr
    assert "Traceback" not in done.stderr
    assert 'mine.py", line 2, in reward' in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_of_torchrun_or_mpirun_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = cli(cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: {name}: 2: a run starts its processes itself")
    assert "parallel=ddp parallel.processes=2" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sweeping_over_presets_that_sweep_is_refused(tmp_path: Path) -> None:
    done = cli("-m", "experiment=rank_sweep,module_sweep", "tracking=none", cwd=tmp_path)
    assert done.returncode == 1
    assert "hydra.sweeper.params" in done.stdout + done.stderr
    assert not list(tmp_path.glob("multirun/*/*/*/run.json"))


def test_other_launchers_can_run_the_job_and_the_table_is_written(tmp_path: Path) -> None:
    """The basic launcher runs it here; joblib and submitit run a pickle of it elsewhere."""
    import pickle

    from lora_exp.__main__ import job

    assert pickle.loads(pickle.dumps(job)) is job
    command = ["-m", "hydra/launcher=basic", "peft.r=2,4", "tracking=none", *QUICK]
    command.append("report=null")
    done = cli(*command, "hydra.sweep.dir=a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "a/b").glob("*.html"))
    rows = json.loads((tmp_path / "a/b/summary.json").read_text())
    table = SweepTable()
    table.folder, table.uses_other_launcher, table.rows = tmp_path / "a/b", True, []
    table.read_jobs()
    assert [(r["job"], r["objective"], r["overrides"]) for r in table.rows] == [
        (r["job"], r["objective"], r["overrides"]) for r in rows
    ]
    command[2] = "peft.r=2,0"  # the faulty job leaves the other run in its directory as it is
    assert cli(*command, "hydra.sweep.dir=a/b", cwd=tmp_path).returncode == 1
    jobs = {(r["overrides"]["peft.r"], r["status"]) for r in read_rows(tmp_path / "a/b")}
    assert jobs == {("2", "finished"), ("4", "finished")}


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_with_processes_of_their_own_train_each_job_alone(
    tmp_path: Path, launcher: str
) -> None:
    command = ["-m", "peft.r=2,4", "tracking=none", *QUICK, "samples.rows=0", "report=null"]
    for folder, words in (("a/b", []), ("other", [f"hydra/launcher={launcher}"])):
        done = cli(*command, *words, f"hydra.sweep.dir={folder}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = [f"{job}/adapter/adapter_model.safetensors" for job in (0, 1)]
    first, other = ([(tmp_path / f / n).read_bytes() for n in names] for f in ("a/b", "other"))
    assert first == other
    rows = [(row["job"], row["status"], row["place"]) for row in read_rows(tmp_path / "other")]
    assert sorted(rows) == [("0", "finished", "alone"), ("1", "finished", "alone")]


def test_a_job_whose_data_changed_is_complete_under_other_launchers(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = ["-m", "hydra/launcher=basic", "peft.r=2", "tracking=none", *QUICK, "data=jsonl"]
    command += ["data.path=rows.jsonl", "hydra.sweep.dir=a/b"]
    for answer in ("yes", "no"):
        rows.write_text(f'{{"prompt": "Is it?", "completion": "{answer}"}}\n' * 24)
        done = cli(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    job, aside = tmp_path / "a/b/0", tmp_path / "a/b/0.other-content"
    assert all((folder / ".hydra/overrides.yaml").is_file() for folder in (job, aside))
    logged = (job / "run.log").read_text()
    assert logged.index("trained again, since rows.jsonl changed") < logged.index("step 3/3")
    assert (aside / "run.log").read_text().count("step 3/3") == logged.count("step 3/3")
    table = SweepTable()
    table.folder, table.uses_other_launcher = tmp_path / "a/b", True
    table.read_jobs()
    assert [(r["job"], r["status"]) for r in table.rows] == [("0", "finished")]
    assert table.rows[0]["overrides"]["peft.r"] == "2"


def test_resuming_a_checkpoint_is_an_error_that_names_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "r/checkpoints/checkpoint-4"
    checkpoint.mkdir(parents=True)
    (tmp_path / "r/config.yaml").touch()
    done = cli(f"resume={checkpoint}", cwd=tmp_path)
    assert done.returncode == 1
    assert f"is a checkpoint; resume={tmp_path}/r goes on from the run's newest" in done.stderr
