"""AGENTS.md is correct: the keys of a run's files, the exit codes, the files of its table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from lora_exp import cli
from lora_exp.record.sweep import job_row
from lora_exp.training import interruption
from tests.conftest import ROOT

TEXT = (ROOT / "AGENTS.md").read_text()


def listed_keys(file: str) -> set[str]:
    """Return the keys that the line of a file names, outside parentheses."""
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| `{file}`"))
    return set(re.findall(r"`([a-z_]+)`", re.sub(r"\([^)]*\)", "", line.split("|")[2])))


def test_a_run_writes_the_json_keys_that_the_page_lists(trained: Callable[..., Path]) -> None:
    run = trained("peft=lora")
    record = json.loads((run / "run.json").read_text())
    assert listed_keys("<run>/run.json") - {"lockstep"} == set(record)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {re.sub("/.*", "", name) for line in lines for name in line}
    assert names == {"step", "train", "eval"}
    assert lines[0]["step"] == 0
    (sample, *_) = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    assert listed_keys("<run>/samples.jsonl") == set(sample)
    job_keys = set(job_row(run, [], SimpleNamespace(_return_value=0.5)))
    assert listed_keys("<sweep>/summary.json") - {"summary.csv"} == job_keys


def test_the_exit_codes_equal_those_of_the_page() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.M)]
    assert codes == [0, 1, 2, interruption.EXIT_CODE, cli.EXIT_INTERRUPTED]
    unknown = [sys.executable, "run.py", "--no-such-flag"]
    assert subprocess.run(unknown, cwd=ROOT, capture_output=True, check=False).returncode == 2


def test_the_commands_with_json_equal_those_of_the_page() -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith("| `--json` of"))
    group: Any = typer.main.get_command(cli.app)
    with_json = {
        name
        for name, command in group.commands.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert set(re.findall(r"`([a-z]+)`", line)) == with_json


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"`((?:lora_exp|conf|tests)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
