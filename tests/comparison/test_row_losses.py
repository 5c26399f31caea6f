"""Losses by row: averaged over seeds, and held against others by a paired bootstrap."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from lora_exp import compare
from lora_exp.comparison.decision import decision
from lora_exp.comparison.row_losses import over_row_losses, row_losses
from lora_exp.comparison.sections import badges, group_table
from lora_exp.comparison.table import page
from lora_exp.runs.run import SavedRun, read_run
from tests.comparison.conftest import Write

COUNTS = [3, 9, 4, 20, 6, 5, 11, 2, 7, 8, 4, 13]  # tokens of rows


def with_losses(directory: Path, losses: Mapping[str, float], tokens: list[int]) -> SavedRun:
    columns = {"rows": list(losses), "tokens": tokens, "losses": list(losses.values())}
    (directory / "row_losses.json").write_text(json.dumps(columns))
    record = json.loads((directory / "run.json").read_text())
    record["metrics"]["eval/loss"] = sum(losses.values()) / sum(tokens)
    (directory / "run.json").write_text(json.dumps(record))
    return read_run(directory)


def test_a_rows_loss_is_the_mean_over_seeds_and_equal_rows_are_one(write_run: Write) -> None:
    directories = [write_run(str(i), overrides={"seed": seed}) for i, seed in enumerate((1, 1, 2))]
    runs = [
        with_losses(directory, {"a": loss, "b": 1.0, str(loss): 9.0}, [2, 3, 1])
        for directory, loss in zip(directories, (1.0, 3.0, 6.0), strict=True)
    ]
    assert row_losses(runs) == {"a": (4.0, 2), "b": (1.0, 3)}
    text = '{"rows": ["a", "a", "b"], "tokens": [2, 2, 1], "losses": [0.5, 0.5, 2.0]}'
    (directories[0] / "row_losses.json").write_text(text)
    assert read_run(directories[0]).row_losses() == {"a": (1.0, 4), "b": (2.0, 1)}


def test_rows_that_one_run_has_more_often_are_left_out(write_run: Write) -> None:
    runs = [
        with_losses(write_run(name), {"a": 1.0 * copies, "b": 2.0}, [2 * copies, 3])
        for name, copies in (("once", 1), ("twice", 2))
    ]
    assert row_losses(runs) == {"b": (2.0, 3)}
    once, twice = (row_losses([run]) for run in runs)
    difference = over_row_losses(twice, once)
    assert difference is not None
    assert (difference.mean, difference.over) == (0.0, "1 rows, too few")


def test_losses_are_not_compared_where_the_metric_is_another_one(write_run: Write) -> None:
    run = with_losses(write_run("a"), {"a": 1.0, "b": 2.0}, [2, 3])
    assert set(row_losses([run])) == {"a", "b"}
    run.record["metrics"]["eval/loss"] *= 1.02  # of smoothed labels, say
    assert row_losses([run]) == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"rows": ["a", "b"], "tokens": [1, 1], "losses": [0.5, null]}']
)
def test_a_run_without_losses_or_with_damaged_ones_is_not_compared(
    write_run: Write, text: str
) -> None:
    run = write_run("a")
    (run / "row_losses.json").write_text(text)
    assert row_losses([read_run(run)]) == {}
    assert over_row_losses({}, {"a": (0.5, 1)}) is None


def test_the_interval_is_scipys_bootstrap_of_the_ratio() -> None:
    generator = random.Random(5)
    counts = [generator.randint(1, 30) for _ in range(80)]
    one = [n * generator.uniform(0.5, 1.5) for n in counts]
    other = [loss + n * generator.gauss(0.05, 0.2) for loss, n in zip(one, counts, strict=True)]
    losses, baseline = (
        {str(i): (loss, n) for i, (loss, n) in enumerate(zip(values, counts, strict=True))}
        for values in (other, one)
    )
    difference = over_row_losses(losses, baseline)
    assert difference is not None
    assert difference.mean == pytest.approx((sum(other) - sum(one)) / sum(counts))
    expected = stats.bootstrap(
        (np.array(other), np.array(one), np.array(counts)),
        lambda x, y, n, axis=-1: (x - y).sum(axis) / n.sum(axis),
        paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert difference.interval == pytest.approx((expected.low, expected.high), abs=0.06 * width)
    assert difference.over == "80 rows"


def test_two_runs_of_one_seed_are_told_apart_by_their_rows(
    write_run: Write, tmp_path: Path
) -> None:
    generator = random.Random(0)
    for name, cost in (("a", 0.0), ("b", 0.5), ("c", 0.0)):
        losses = {str(i): n * (1 + cost) + generator.gauss(0, 0.2) for i, n in enumerate(COUNTS)}
        mean = sum(losses.values()) / sum(COUNTS)
        with_losses(write_run(name, mean, overrides={"peft.r": name}), losses, COUNTS)
    best, close, worse = compare(tmp_path).groups
    assert (best.verdict, worse.verdict) == ("baseline", "worse")
    assert close.verdict == "cannot be told apart"
    assert worse.over_rows is worse.row_losses
    assert worse.row_losses is not None
    assert worse.difference is not None
    assert worse.row_losses.over == "12 rows"
    assert worse.row_losses.mean == pytest.approx(worse.difference.mean)
    console = Console(file=io.StringIO(), width=200)
    console.print(page(compare(tmp_path)))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    low, high = worse.row_losses.interval or (0.0, 0.0)
    assert f"[{low:+.2g}, {high:+.2g}] 12 rows" in printed
    assert "over rows a verdict is about these runs" in printed
    headline, support = decision(compare(tmp_path), "eval/loss")
    assert "1 other cannot be told apart" in headline
    assert "over 12 rows), not told apart." in support[0]
    groups = compare(tmp_path).of("eval/loss")
    table = group_table(groups, ["peft.r"], badges(groups, 0))
    notes = [row["cells"][4]["note"] for row in table["rows"]]
    assert notes[2] == f"one seed\n[{low:+.3g}, {high:+.3g}] 12 rows"
    few = over_row_losses({"a": (1.0, 1)}, {"a": (2.0, 1)})
    assert few is not None
    assert (few.interval, few.over, few.mean) == (None, "1 rows, too few", -1.0)
