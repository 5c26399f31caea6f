"""Jobs of a sweep in order: only those that are judged alike are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lora_exp.record.ranking import judgements, sort_key, sweep_table


def row(job: str, algorithm: str | None, name: str, value: float | None, **more: Any) -> Any:
    goal = "minimize" if name.endswith("loss") else "maximize"
    return {
        "job": job, "name": job, "algorithm": algorithm, "judged_by": value and name,
        "goal": goal, "objective": value, "status": "finished", "proven": True,
        "overrides": {"algorithm": str(algorithm)}, "metrics": {"seconds": 2.0},
    } | more  # fmt: skip


ROWS = [
    row("0", "dpo", "eval/preference_accuracy", 0.6),
    row("1", "kto", "eval/loss", 0.5),
    row("2", "sft", "eval/loss", 2.0),
    row("3", "sft", "eval/loss", 1.0),
    row("4", "grpo", "eval/preference_accuracy", 0.9),
    row("5", "sft", "eval/loss", None, status="failed"),
]


def text_of(rows: list[Any]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(sweep_table(Path("sweep"), rows))
    return capture.get()


def test_jobs_judged_by_different_objectives_are_groups_each_with_its_best_first() -> None:
    rows = sorted(ROWS, key=sort_key)
    assert [r["job"] for r in rows] == ["1", "3", "2", "4", "0", "5"]
    # each algorithm has its own loss, and an accuracy is the same for all
    assert judgements(rows) == ["eval/loss of kto", "eval/loss of sft", "eval/preference_accuracy"]


def test_the_table_says_what_is_not_compared() -> None:
    text = text_of(sorted(ROWS, key=sort_key))
    assert "judged by" in text
    words = "not compared with each other: jobs judged by eval/loss of kto, eval/loss of sft"
    assert words in " ".join(text.split())
    assert text.count("├") == 3  # a section each, and the failed job
    alike = text_of(ROWS[2:4])
    assert "judged by" not in alike
    assert "compared" not in alike


def test_the_table_says_whose_the_seconds_of_a_pack_are() -> None:
    packed = [r | {"place": "lockstep, exact"} for r in ROWS[2:4]]
    assert "a job's own share" in text_of(packed)
    assert "share" not in text_of([r | {"place": "alone"} for r in ROWS[2:4]])


def test_rows_that_earlier_versions_wrote_without_an_algorithm_are_compared() -> None:
    rows = [row("0", None, "eval/loss", 2.0), row("1", None, "eval/loss", 1.0)]
    assert [r["job"] for r in sorted(rows, key=sort_key)] == ["1", "0"]
    assert judgements(rows) == ["eval/loss"]
