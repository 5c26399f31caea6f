"""The decision in sentences."""

from __future__ import annotations

from lora_exp.comparison.decision import decision, tiles
from lora_exp.comparison.value import Comparison, compare
from tests.comparison.conftest import Write


def compared(write_run: Write, values: dict[int, list[float]], **options: object) -> Comparison:
    """Compare runs with these values: a list by rank, one for each seed."""
    for rank, losses in values.items():
        for seed, loss in enumerate(losses):
            write_run(f"s/{rank}-{seed}", loss, overrides={"peft.r": rank, "seed": seed})
    run = write_run("s/0", None, overrides={"peft.r": 99}, status="failed")
    return compare(run.parent, **options)  # type: ignore[arg-type]


def test_groups_that_are_all_worse_make_a_decision(write_run: Write) -> None:
    comparison = compared(write_run, {4: [1.0, 1.01, 1.02], 8: [2.0, 2.02, 2.04]})
    headline, support = decision(comparison, "eval/loss")
    text = "peft.r=4 has the lowest eval/loss, 1.01 ± 0.01, and every other group is worse."
    assert headline == text
    next_group = "The next, peft.r=8: +1.01 (95% interval +0.985 to +1.03 over 3 seeds), worse."
    assert support == [next_group]


def test_what_cannot_be_told_apart_is_said(write_run: Write) -> None:
    values = {4: [1.0, 1.5, 1.2], 8: [1.2, 1.1, 1.5], 16: [9.0, 9.5, 9.2]}
    headline, _ = decision(compared(write_run, values), "eval/loss")
    assert headline.endswith("; 1 other cannot be told apart from it.")


def test_one_seed_tells_nothing_apart(write_run: Write) -> None:
    headline, support = decision(compared(write_run, {4: [1.0], 8: [2.0]}), "eval/loss")
    assert headline.endswith("but no other group can be told apart from it.")
    assert support[-1] == "One seed each: seed=1,2,3 would tell a difference from chance."


def test_another_baseline_is_named(write_run: Write) -> None:
    comparison = compared(write_run, {4: [1.0, 1.1, 1.2], 8: [2.0, 2.11, 2.22]}, against="s-8-0")
    headline, support = decision(comparison, "eval/loss")
    assert headline.endswith("against the baseline it is better.")
    assert support[0].startswith("Against the baseline, peft.r=8: -1.01 ")


def test_one_group_or_none_is_no_choice(write_run: Write) -> None:
    comparison = compared(write_run, {4: [1.0, 2.0]})
    headline, _ = decision(comparison, "eval/loss")
    assert headline == "eval/loss is 1.5 ± 0.71 with peft.r=4, the only group that has finished."
    failed = compare(comparison.groups[-1].runs[0].directory)
    assert decision(failed, failed.objectives[0])[0].startswith("No run has finished")
    assert [tile[0] for tile in tiles(failed)] == ["runs", "groups"]


def test_the_tiles_count_the_runs_and_name_the_best(write_run: Write) -> None:
    made = tiles(compared(write_run, {4: [1.0]}))
    found = {name: (value, note) for name, value, note in made}
    assert found["runs"] == ("2", "1 finished, 1 failed")
    assert found["eval/loss"] == ("1", "")
    assert found["its trained parameters"] == ("1,000", "")
