"""The command line: quick help, one clear line for what is wrong, pages for people."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.after.test_chat import lora_exp

Trained = Callable[..., Path]


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.argv = ['lora-exp', *{arguments}]\nfrom lora_exp.cli import main\n"
    script += "try: main()\nfinally: assert 'torch' not in sys.modules"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_help_is_quick_and_imports_no_torch() -> None:
    started = time.perf_counter()
    done = without_torch("--help")
    assert time.perf_counter() - started < 5  # docs/benchmarks.md has the true figure
    assert done.returncode == 0, done.stderr
    commands = "run inspect save merge check chat generate evaluate serve push doctor estimate"
    for command in commands.split():
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "inspect nowhere", "save nowhere -o out", "merge nowhere -o out", "check nowhere",
        "check . --adapter nowhere", "chat nowhere", "chat mine=nowhere", "serve nowhere",
        "generate nowhere --prompts p -o out", "evaluate nowhere --data d", "push nowhere me/it",
    ],
)  # fmt: skip
def test_a_path_with_nothing_is_told_before_torch_is_imported(command: str) -> None:
    done = without_torch(*command.split())
    assert done.returncode == 1
    assert done.stderr == "SavedError: nowhere does not exist\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["inspect"], 2, "Missing argument 'PATH'"),
        (["inspect", "nowhere", "--jsn"], 2, "--jsn"),
        (["check", "nowhere", "--prompts", "x"], 2, "need it"),
        (["estimate", "demo"], 1, "demo: cannot be read; give key=value"),
        (["merge", "a", "-o", "b", "--dtype", "int3"], 2, "'int3' is not one of"),
        (["merge", "a", "-o", "b", "--weights", "x"], 2, "numbers with commas between"),
        (["instpect", "a"], 2, "inspect"),
        (["peft.r=8"], 2, "lora-exp run peft.r=8 trains"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments: list[str], code: int, said: str) -> None:
    done = lora_exp(*arguments)
    assert done.returncode == code
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_inspect_merge_and_check_by_hand(trained: Trained, tmp_path: Path) -> None:
    run, merged = str(trained("peft=lora", "quant=nf4")), str(tmp_path / "merged")
    page = lora_exp("inspect", run)
    assert page.returncode == 0, page.stderr
    assert "norm of each module's update (r 16, alpha 32 everywhere)" in page.stdout
    assert "pkg://lora_exp/assets/tiny at sha256:" in page.stdout
    found = json.loads(lora_exp("inspect", run, "--json").stdout)
    assert found["kind"] == "adapter"
    made = lora_exp("merge", run, "-o", merged)
    assert made.returncode == 0, made.stderr
    assert f"prove it: lora-exp check {merged} --adapter {run}" in made.stdout
    few = ("--max-new-tokens", "8")
    proof = lora_exp("check", merged, "--adapter", run, *few)
    assert proof.returncode == 0, proof.stderr
    assert "the merged model is the adapter on its base" in proof.stdout
    wrong = lora_exp("check", merged, "--adapter", str(trained("peft=rslora")), "--json", *few)
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["holds"] is False
    plain = lora_exp("check", merged)
    assert plain.returncode == 0
    assert plain.stdout.count(" ok  ") == 4
    again = lora_exp("merge", run, "-o", merged)
    assert again.returncode == 1
    assert "--force replaces it" in again.stderr


def test_run_is_the_runner(tmp_path: Path) -> None:
    done = lora_exp("run", "--cfg", "job", "peft.r=4")
    assert done.returncode == 0, done.stderr
    assert "r: 4" in done.stdout
    wrong = lora_exp("run", "peft.r=0", f"hydra.run.dir={tmp_path}/run")
    assert wrong.returncode == 1
    assert "peft.r: 0 is no rank" in wrong.stderr


def test_the_version_is_told() -> None:
    assert lora_exp("--version").stdout.strip() == version("lora-exp")


COMPLETING = "import sys; sys.argv[0] = 'lora-exp'\nfrom lora_exp.cli import main; main()"


def test_a_shell_completes_what_follows_run() -> None:
    environment = {"_LORA_EXP_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for typed, wanted in (("quant=n", "quant=nf4"), ("pef", "peft="), ("peft.lora_a", "alpha=")):
        words = {"COMP_WORDS": f"lora-exp run {typed}"}
        done = subprocess.run(
            [sys.executable, "-c", COMPLETING],
            env={**os.environ, **environment, **words}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert wanted in done.stdout, done.stderr


def test_a_sweep_is_inspected_as_its_table_showed_it_and_evaluated_by_its_best(
    trained: Trained, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    for number, overrides in enumerate((["peft.r=2"], ["peft.r=8"])):
        shutil.copytree(trained(*overrides), sweep / str(number))
        (sweep / str(number) / ".hydra").mkdir()
        (sweep / str(number) / ".hydra/overrides.yaml").write_text(f"- {overrides[0]}\n")
    found = json.loads(lora_exp("inspect", str(sweep), "--json").stdout)
    assert found["jobs"][0]["value"] <= found["jobs"][1]["value"]
    assert found["best"] == found["jobs"][0]["path"]
    page = lora_exp("inspect", str(sweep))
    assert f"best: {found['best']}" in page.stdout.replace("\n", "")
    assert "peft.r" in page.stdout
    told = lora_exp("evaluate", str(sweep), "--json")
    assert told.returncode == 0, told.stderr
    assert f"its best is {found['best']}" in told.stderr.replace("\n", "")
    measured = json.loads(told.stdout)
    record = json.loads((Path(found["best"]) / "run.json").read_text())
    assert measured["data"] == record["data"]
    assert measured["rows"] == record["counts"]["eval_rows"]
    assert measured["results"]["adapter"]["loss"] == pytest.approx(
        record["metrics"]["eval/loss"], abs=0.05
    )
