"""Comparisons of written runs: groups, baselines, verdicts, hostile records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compare
from lora_exp.errors import SavedError

Write = Callable[..., Path]


@pytest.fixture
def sweep(write_run: Write, tmp_path: Path) -> Path:
    """Two ranks of three seeds; rank 16 is clearly better."""
    for rank, loss in ((4, 0.5), (16, 0.3)):
        for seed in (1, 2, 3):
            overrides = {"peft.r": rank, "seed": seed}
            write_run(f"sweep/{rank}-{seed}", loss + 0.001 * seed * rank, overrides=overrides)
    return tmp_path / "sweep"


def test_seeds_are_one_group_held_against_the_best(sweep: Path) -> None:
    comparison = compare(sweep)
    assert comparison.keys == ("peft.r",)
    assert [g.label for g in comparison.groups] == ["peft.r=16", "peft.r=4"]
    best, other = comparison.groups
    assert (best.mean, best.spread) == (pytest.approx(0.332), pytest.approx(0.016))
    assert (best.verdict, other.verdict) == ("baseline", "worse")
    assert [run.seed for run in other.runs] == [1, 2, 3]
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(0.176)
    assert comparison.baseline("eval/loss") is best
    assert comparison.warnings == ()


def test_the_baseline_is_chosen_by_directory_or_name(
    sweep: Path, write_run: Write, tmp_path: Path
) -> None:
    for against in (sweep / "4-2", "sweep-4-2"):
        comparison = compare(sweep, against=against)
        assert [g.verdict for g in comparison.groups] == ["better", "baseline"]
    outside = write_run("other", 0.1, overrides={"peft.r": 64})
    comparison = compare(sweep, against=str(outside))
    assert [g.verdict for g in comparison.groups] == ["baseline", *["cannot be told apart"] * 2]
    with pytest.raises(SavedError, match=r"no run has that directory or name \(did you mean"):
        compare(sweep, against="sweep-4-22")
    with pytest.raises(SavedError, match="2 different groups; name one run's"):
        compare(sweep, against=sweep)
    failed = write_run("failed", status="failed")
    with pytest.raises(SavedError, match="it is failed; name a run that has finished"):
        compare(sweep, against=failed)


def test_the_best_of_a_metric_that_rises_is_the_highest(write_run: Write, tmp_path: Path) -> None:
    for rank, score in ((4, 0.2), (8, 0.9)):
        write_run(str(rank), score, overrides={"peft.r": rank}, goal="maximize")
    assert compare(tmp_path).groups[0].values == {"peft.r": 8}


def test_an_objective_has_one_goal_whatever_an_old_record_says(
    write_run: Write, tmp_path: Path
) -> None:
    goals = {0.2: "maximize", 0.9: "maximize", 0.5: "minimize"}
    for value, goal in goals.items():
        write_run(str(value), value, overrides={"peft.r": value}, goal=goal)
    comparison = compare(tmp_path)
    assert [group.mean for group in comparison.groups] == [0.9, 0.5, 0.2]
    assert {group.goal for group in comparison.groups} == {"maximize"}


def test_pruned_and_failed_runs_are_groups_of_their_own(write_run: Write, tmp_path: Path) -> None:
    write_run("a", 0.5)
    write_run("b", 0.1, status="pruned", overrides={"seed": 2})
    write_run("c", status="failed", overrides={"seed": 3})
    write_run("d", status="running", overrides={"seed": 4})
    write_run("e", float("nan"), overrides={"seed": 5})
    groups = compare(tmp_path).groups
    assert [(g.status, g.mean, g.verdict) for g in groups] == [
        ("finished", 0.5, "baseline"),
        ("pruned", 0.1, ""),
        ("1 failed, 1 killed at step 0, 1 finished without a value", None, ""),
    ]


def test_different_objectives_are_never_held_against_each_other(
    write_run: Write, tmp_path: Path
) -> None:
    write_run("a", 0.5)
    write_run("b", 0.6, overrides={"peft.r": 4})
    record: dict[str, Any] = {
        "objective": "eval/accuracy", "goal": "maximize", "metrics": {"eval/accuracy": 0.9},
    }  # fmt: skip
    write_run("c", **record)
    write_run("d", **(record | {"metrics": {"eval/accuracy": 0.8}}), overrides={"peft.r": 4})
    comparison = compare(tmp_path)
    assert comparison.objectives == ("eval/loss", "eval/accuracy")
    differences = [[g.difference and g.difference.mean for g in comparison.of(name)]
                   for name in comparison.objectives]  # fmt: skip
    assert differences == [[None, pytest.approx(0.1)], [None, pytest.approx(-0.1)]]


def test_exact_match_must_hold_over_seeds_and_over_rows(write_run: Write, tmp_path: Path) -> None:
    def write(folder: str, rank: int, seed: int, rights: int, rows: int) -> None:
        answers = ["yes" if i < rights else "no" for i in range(rows)]
        write_run(
            f"{folder}/{rank}-{seed}", overrides={"peft.r": rank, "seed": seed}, answers=answers,
            objective="eval/exact_match", goal="maximize",
            metrics={"eval/exact_match": rights / rows},
        )  # fmt: skip

    for seed in (1, 2, 3):
        write("few", 4, seed, 20, 50)
        write("few", 8, seed, 22 + (seed == 2), 50)  # the same two or three rows decide
        write("many", 4, seed, 20, 100)
        write("many", 8, seed, 80 + seed, 100)
    few, many = (compare(tmp_path / name).groups[1] for name in ("few", "many"))
    assert few.difference is not None
    assert few.rows is not None
    assert (few.difference.verdict, few.rows.verdict) == ("worse", "cannot be told apart")
    assert few.verdict == "cannot be told apart"
    assert many.verdict == "worse"


def test_rows_tell_one_seed_apart_where_they_measure_the_objective(
    write_run: Write, tmp_path: Path
) -> None:
    for rank, answer in ((4, "no"), (8, "yes")):
        write_run(
            str(rank), overrides={"peft.r": rank}, answers=[answer] * 12, goal="maximize",
            objective="eval/exact_match", metrics={"eval/exact_match": float(answer == "yes")},
        )  # fmt: skip
    assert [g.verdict for g in compare(tmp_path).groups] == ["baseline", "worse"]


def test_one_run_is_a_comparison_of_one(write_run: Write) -> None:
    (group,) = compare(write_run("a")).groups
    assert (group.label, group.verdict, group.spread) == ("a", "baseline", None)


def test_a_cost_is_a_mean_and_says_when_it_is_a_packs(write_run: Write, tmp_path: Path) -> None:
    pack = {"place": "lockstep, exact"}
    write_run("a", 0.1, **pack)
    write_run("b", 0.1, **pack, overrides={"seed": 2}, metrics={"seconds": 7, "peak_bytes": 2**31})
    write_run("c", 0.2, overrides={"peft.r": 2}, counts=None, metrics={"train/tokens_per_s": 0.0})
    together, alone = (g.cost for g in compare(tmp_path).groups)
    assert (together.parameters, together.peak_bytes, together.seconds) == (1000, 2**31, 6)
    assert together.of_pack
    assert (alone.parameters, alone.tokens_per_s, alone.of_pack) == (None, None, False)
    write_run("d", 0.1, overrides={"seed": 3}, metrics={"seconds": 2})
    measured = compare(tmp_path).groups[0].cost
    assert (measured.seconds, measured.peak_bytes, measured.of_pack) == (2, 2**30, False)


def test_records_of_odd_types_are_compared_as_far_as_they_go(
    write_run: Write, tmp_path: Path
) -> None:
    write_run("a", "x", goal=3, counts=[], versions=None, stopped="s", tracking_id=[])
    write_run("b", objective=None, goal=None)
    write_run("c", objective=["list"])
    (write_run("d") / "config.yaml").write_text("- a\n: [")
    (tmp_path / "e").mkdir()
    (tmp_path / "e/run.json").write_text('{"status": "finished", "metrics": {}}')
    comparison = compare(tmp_path)
    assert [group.status for group in comparison.groups] == ["finished without a value"] * 3
    assert comparison.keys == ()
    (damaged,) = (line for line in comparison.warnings if "damaged" in line)
    assert damaged.count("config.yaml is missing or cannot be read") == 2
    json.dumps(comparison.rows())


def test_paths_without_runs_are_refused(write_run: Write, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match="name a run, a sweep"):
        compare()
    (write_run("a") / "run.json").write_text("{")
    with pytest.raises(SavedError, match=r"no run can be read: .*run\.json cannot be read"):
        compare(tmp_path / "a")


def test_the_table_is_a_data_frame_only_where_pandas_is_installed(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare(sweep)
    assert type(comparison.table).__name__ == "DataFrame"  # datasets requires pandas
    assert list(comparison.table["peft.r"]) == ["16", "4"]
    monkeypatch.setattr("lora_exp.comparison.value.find_spec", lambda name: None)
    assert compare(sweep).table == comparison.rows()
