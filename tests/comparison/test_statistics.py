"""Intervals and verdicts, against scipy and numbers worked by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lora_exp import compare
from lora_exp.comparison.statistics import (
    BATCH,
    EXACT_MATCH,
    PREFERENCE,
    RESAMPLES,
    SAME,
    Difference,
    bootstrap_interval,
    matches,
    mean_and_spread,
    over_rows,
    over_seeds,
    preferences,
    t_interval,
)
from lora_exp.runs.run import SavedRun, read_run

Write = Callable[..., Path]


def test_the_interval_over_seeds_is_that_of_the_paired_t_test() -> None:
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # 3 -+ 2.776445 * sqrt(2.5 / 5)
    assert (low, high) == pytest.approx((1.036757, 4.963243), abs=1e-6)
    ours = {1: 0.31, 2: 0.35, 3: 0.36}
    baseline = {3: 0.30, 1: 0.29, 2: 0.30, 4: 9.0}
    difference = over_seeds(ours, baseline, "eval/loss", "minimize")
    expected = stats.ttest_rel([0.31, 0.35, 0.36], [0.29, 0.30, 0.30]).confidence_interval()
    assert difference.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert difference.mean == pytest.approx(0.13 / 3)
    assert difference.over == "3 seeds"


def test_the_interval_over_rows_is_scipys_paired_bootstrap() -> None:
    generator = random.Random(3)
    one = np.array([float(generator.random() < 0.7) for _ in range(60)])
    other = np.array([float(generator.random() < 0.4) for _ in range(60)])
    low, high = bootstrap_interval(list(one - other))
    expected = stats.bootstrap(
        (one, other), lambda x, y, axis=-1: (x - y).mean(axis), paired=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert (low, high) == bootstrap_interval(list(one - other))
    exact = stats.bootstrap(
        (one - other,), np.mean, method="percentile", n_resamples=RESAMPLES, batch=BATCH // 60,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (low, high) == (exact.low, exact.high)
    spread = float((one - other).std() / 60**0.5)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_bounds_that_do_not_contain_0_are_better_or_worse_by_the_goal() -> None:
    def verdict(goal: str, mean: float, *interval: float) -> str:
        bounds = (interval[0], interval[1]) if interval else None
        return Difference("m", goal, mean, bounds, "3 seeds").verdict

    assert verdict("minimize", 0.2, 0.1, 0.3) == "worse"
    assert verdict("maximize", 0.2, 0.1, 0.3) == "better"
    assert verdict("minimize", -0.2, -0.3, -0.1) == "better"
    assert verdict("minimize", 0.2, 0.0, 0.4) == "cannot be told apart"
    assert verdict("maximize", 0.2, -0.1, 0.5) == "cannot be told apart"
    assert verdict("maximize", 5.0) == "cannot be told apart"


@pytest.mark.parametrize(
    ("ours", "baseline", "mean", "over"),
    [
        ({1: 0.5}, {1: 0.25}, 0.25, "one seed"),
        ({1: 0.5}, {2: 0.25}, 0.25, "one seed"),
        ({1: 0.5, 2: 0.7}, {2: 0.25}, 0.45, "fewer than two seeds in common"),
        ({1: 0.5, 2: 0.7}, {3: 0.2, 4: 0.4}, 0.3, "fewer than two seeds in common"),
        ({1: 0.5, 2: 0.5}, {1: 0.25, 2: 0.25}, 0.25, "2 seeds with one difference"),
    ],
)
def test_too_little_to_tell_gives_no_interval_and_says_why(
    ours: dict[int, float], baseline: dict[int, float], mean: float, over: str
) -> None:
    difference = over_seeds(ours, baseline, "m", "maximize")
    assert difference.interval is None
    assert difference.mean == pytest.approx(mean)
    assert difference.over == over
    assert difference.verdict == "cannot be told apart"


def test_equal_groups_are_seldom_told_apart() -> None:
    generator = random.Random(1)
    false_alarms = 0
    for _ in range(400):
        ours, baseline = ({s: generator.gauss(1, 0.1) for s in range(3)} for _ in range(2))
        false_alarms += over_seeds(ours, baseline, "m", "minimize").verdict != (
            "cannot be told apart"
        )
    assert false_alarms < 400 * 0.08  # 5% promised; a bootstrap of three would give 25%


def test_mean_and_spread_are_those_of_a_sample() -> None:
    assert mean_and_spread([]) == (None, None)
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def answered(write_run: Write, name: str, right: str, seed: int = 1) -> SavedRun:
    """Return a run whose answer i is right where the i-th letter is x."""
    answers = [" yes\n" if c == "x" else "no" for c in right]
    return read_run(write_run(name, answers=answers, overrides={"seed": seed}))


def test_rows_are_paired_by_prompt_and_averaged_over_runs(write_run: Write) -> None:
    ours = [answered(write_run, "a", "x" * 8 + ".."), answered(write_run, "b", "x" * 10, seed=2)]
    baseline = [answered(write_run, "c", "." * 10)]
    difference = over_rows(matches(ours), matches(baseline), EXACT_MATCH)
    assert difference is not None
    assert (difference.measure, difference.over) == ("eval/exact_match", "10 rows")
    assert difference.mean == pytest.approx(0.9)
    assert difference.verdict == "better"
    again = answered(write_run, "e", "x" * 10, seed=2)
    assert matches([*ours, again]) == matches(ours)
    few = over_rows(matches(ours), matches([answered(write_run, "d", "..")]), EXACT_MATCH)
    assert few is not None
    assert (few.over, few.interval, few.mean) == ("2 rows, too few", None, 1.0)


def test_two_runs_of_one_seed_are_told_apart_by_their_pairs(
    write_run: Write, tmp_path: Path
) -> None:
    for name, right in (("a", 11), ("b", 2), ("c", 10)):
        metrics = {PREFERENCE: right / 12}
        run = write_run(
            name, metrics=metrics, objective=PREFERENCE, goal="maximize", overrides={"peft.r": name}
        )
        columns = {"pairs": ["same", "same", *"0123456789"]}
        columns["preferred"] = [n < right for n in range(12)]
        (run / "pairs.json").write_text(json.dumps(columns))
    best, close, worse = compare(tmp_path).groups
    assert (best.verdict, close.verdict, worse.verdict) == ("baseline", SAME, "worse")
    assert worse.over_rows is worse.beside is worse.pairs
    assert worse.pairs is not None
    assert worse.difference is not None
    assert worse.pairs.over == "12 rows"
    assert worse.pairs.mean == pytest.approx(worse.difference.mean)
    seeds = [read_run(tmp_path / "a"), read_run(write_run("d", overrides={"seed": 2}))]
    assert preferences(seeds[:1])["same", 1] == 1.0
    assert preferences(seeds) == {}  # the other has recorded none


def test_rows_without_an_expected_answer_or_a_counterpart_are_not_compared(
    write_run: Write,
) -> None:
    ours, none = answered(write_run, "a", "x" * 9), answered(write_run, "b", "")
    assert over_rows(matches([ours]), matches([none]), EXACT_MATCH) is None
    assert over_rows(matches([ours, none]), matches([ours]), EXACT_MATCH) is None
    odd = read_run(write_run("c"))
    lines = ['{"prompt": "0?", "expected": null, "after": "a"}', '{"after": 3}', "[]", "nonsense"]
    (odd.directory / "samples.jsonl").write_text("\n".join(lines))
    assert over_rows(matches([odd]), matches([odd]), EXACT_MATCH) is None
    assert over_rows(matches([ours]), matches([odd]), EXACT_MATCH) is None


def test_differences_that_cancel_are_zero() -> None:
    difference = over_rows({0: 1.0, 1: 0.0, 2: 0.0}, dict.fromkeys(range(3), 1 / 3), EXACT_MATCH)
    assert difference is not None
    assert str(difference.mean) == "0.0"
    opposite = over_rows(dict.fromkeys(range(3), 1 / 3), {0: 1.0, 1: 0.0, 2: 0.0}, EXACT_MATCH)
    assert opposite is not None
    assert str(opposite.mean) == "0.0"


def test_equal_prompts_are_different_rows(write_run: Write) -> None:
    line = '{"prompt": "p", "expected": "yes", "after": "%s"}\n'
    runs = []
    for name, answer in (("a", "yes"), ("b", "no")):
        run = read_run(write_run(name))
        (run.directory / "samples.jsonl").write_text(line % "yes" + line % answer)
        runs.append(run)
    difference = over_rows(matches(runs[:1]), matches(runs[1:]), EXACT_MATCH)
    assert difference is not None
    assert (difference.over, difference.mean) == ("2 rows, too few", 0.5)
