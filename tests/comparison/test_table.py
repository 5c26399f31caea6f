"""What `lora-exp compare` prints and writes, hostile texts included; and how fast."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lora_exp import compare
from lora_exp.comparison.table import as_json, page, write_csv

Write = Callable[..., Path]


def printed(path: Path, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(page(compare(path)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def sweep(write_run: Write, tmp_path: Path) -> Path:
    for rank in (4, 8):
        for seed in (1, 2, 3):
            write_run(
                f"sweep/{rank}-{seed}", 0.5 - 0.02 * rank + 0.001 * seed * rank,
                overrides={"peft.r": rank, "seed": seed}, settings={"peft.alpha": 2 * rank},
                answers=["yes" if rank == 8 else "no"] * 10, place="lockstep, exact",
            )  # fmt: skip
    return tmp_path / "sweep"


def test_the_page_has_means_intervals_verdicts_costs_and_notes(sweep: Path) -> None:
    lines = printed(sweep).splitlines()
    best = next(line for line in lines if line.split()[:1] == ["8"])
    other = next(line for line in lines if line.split()[:1] == ["4"])
    assert "0.356 ± 0.008" in best
    assert "baseline" in best
    assert "worse" in other
    assert "+0.072 [+0.062, +0.082]" in other
    assert "-1 [-1, -1]" in other
    for text in ("1,000", "~1.00 GiB", "100", "5"):
        assert text in other
    text = "\n".join(lines)
    assert "~ is the memory of a pack" in text
    assert "follow from the columns: peft.alpha" in text
    assert "95% interval" in text
    assert "status" not in text


def test_one_seed_is_told_how_to_tell_more(write_run: Write, tmp_path: Path) -> None:
    write_run("a", 0.5)
    write_run("b", 0.7, overrides={"peft.r": 4})
    text = printed(tmp_path)
    assert "+0.2 (one seed)" in text
    assert "one seed each: seed=1,2,3" in text


def test_hostile_texts_are_printed_as_they_are(write_run: Write, tmp_path: Path) -> None:
    write_run("[red]a", 0.5, overrides={"[bold]key": "[red]<script>alert(1)</script>\x1b[2J\n"})
    write_run("b", 0.6, objective="[i]m", metrics={"[i]m": 0.1}, versions={"[/x]": "\x1b]0;t\x07"})
    text = printed(tmp_path)
    assert "[red]<script>alert(1)</script>" in text
    assert "[bold]key" in text
    assert "[i]m" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_many_keys_are_cut_and_named(write_run: Write, tmp_path: Path) -> None:
    for value in (1, 2):
        write_run(str(value), 0.5, overrides={f"train.k{i}": value for i in range(8)})
    text = printed(tmp_path)
    assert "also varied, in --csv and --json: train.k6, train.k7" in text
    assert all(f"train.k{i}" in compare(tmp_path).rows()[0] for i in range(8))


def test_files_have_the_numbers_that_are_printed(sweep: Path, tmp_path: Path) -> None:
    comparison = compare(sweep)
    write_csv(comparison, tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["peft.r"] for row in rows] == ["8", "4"]
    assert float(rows[1]["difference"]) == pytest.approx(0.072)
    values = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    (objective,) = values["objectives"]
    assert (objective["objective"], objective["goal"]) == ("eval/loss", "minimize")
    group = objective["groups"][1]
    assert group["difference"]["interval"][0] == float(rows[1]["low"])
    assert (group["difference"]["verdict"], group["rows"]["over"]) == ("worse", "10 rows")
    assert group["cost"]["of_pack"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "lora_exp.cli", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_27_runs_are_compared_in_3_s_without_torch(write_run: Write, tmp_path: Path) -> None:
    for number in range(27):
        write_run(
            f"sweep/{number}", 0.5 + number / 100 + number % 3 / 50,
            overrides={"peft.r": 2 ** (number // 3), "seed": number % 3},
            answers=["yes", "no"] * 50, history=[{"step": i, "train/loss": 1} for i in range(200)],
        )  # fmt: skip
    before = os.times()
    done = run(str(tmp_path / "sweep"), "--csv", str(tmp_path / "t.csv"), "--against", "sweep-4")
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "peft.r" in done.stdout
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 10
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "scipy.special" in imported
    assert not imported & {"torch", "transformers", "wandb", "scipy.stats"}
    seconds = after.children_user - before.children_user
    assert seconds + after.children_system - before.children_system < 3


def test_mistakes_are_one_line(write_run: Write, tmp_path: Path) -> None:
    write_run("first")
    for arguments, text in (
        ([str(tmp_path / "frst")], "there is no such folder (did you mean first?)"),
        ([str(tmp_path), "--against", "c"], "--against c: no run has that directory or name"),
        ([str(tmp_path / "first/run.json")], "is a file; name the folder of a run"),
    ):
        done = run(*arguments)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert (done.returncode, len(lines)) == (1, 1), lines
        assert lines[0].startswith("SavedError: ")
        assert text in lines[0]
