"""The difference of two groups' losses, over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from lora_exp.comparison.statistics import FEWEST_ROWS, Difference, bootstrap_interval
from lora_exp.runs.run import SavedRun

AGREEMENT = 0.005  # relative; precision and the order of sums differ by less
LOSS = "eval/loss"  # the metric that is the mean of these losses over tokens
Losses = Mapping[str, tuple[float, int]]  # by row: the sum of its tokens' losses, how many


def row_losses(runs: Sequence[SavedRun]) -> dict[str, tuple[float, int]]:
    """Return each row's loss as the mean over seeds, for the rows that all runs have equally often.

    Of several runs with one seed, the mean of those.
    """
    by_seed: dict[int | None, list[Losses]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(_losses(run))
    every = [losses for same_seed in by_seed.values() for losses in same_seed]
    rows = [row for row in every[0] if len({_tokens(row, o) for o in every}) == 1] if every else []
    return {
        row: (
            fmean(fmean(losses[row][0] for losses in same) for same in by_seed.values()),
            every[0][row][1],
        )
        for row in rows
    }


def _losses(run: SavedRun) -> Losses:
    """Return a run's losses by row; none if `eval/loss` is not their mean over tokens.

    A trainer may measure something else: smoothed labels, another loss, one of experts' balance.
    """
    losses, mean = run.row_losses(), run.record.get("metrics", {}).get(LOSS)
    tokens = sum(count for _, count in losses.values())
    total = sum(loss for loss, _ in losses.values())
    agrees = mean is not None and tokens and math.isclose(total / tokens, mean, rel_tol=AGREEMENT)
    return losses if agrees else {}


def _tokens(row: str, losses: Losses) -> int:
    """Return how many tokens of a row count, 0 without it; copies of a row are added up."""
    return losses[row][1] if row in losses else 0


def over_row_losses(losses: Losses, baseline: Losses) -> Difference | None:
    """Compare the loss a token of two groups, as pairs of the rows that both have equally often.

    The difference is a ratio, of all rows' differences to all rows' tokens. For the bootstrap it is
    linearised (Cochran 1977, Sampling Techniques, 6.4): a row's value is the ratio and the row's
    own deviation from it, so that the mean over rows is the ratio.

    Args:
        losses: from `row_losses`.
        baseline: from `row_losses`.

    Returns:
        The difference; None: there is no row in both.
    """
    pairs = [
        (loss - baseline[row][0], tokens)
        for row, (loss, tokens) in losses.items()
        if tokens and tokens == _tokens(row, baseline)
    ]
    if not pairs:
        return None
    mean_tokens = fmean(tokens for _, tokens in pairs)
    ratio = fmean(difference for difference, _ in pairs) / mean_tokens
    values = [ratio + (d - ratio * tokens) / mean_tokens for d, tokens in pairs]
    enough = len(pairs) >= FEWEST_ROWS
    over = f"{len(pairs)} rows" + ("" if enough else ", too few")
    return Difference(LOSS, "minimize", ratio, bootstrap_interval(values) if enough else None, over)
