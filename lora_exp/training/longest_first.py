"""The order in which held-out rows are evaluated: rows of a batch have about the same length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute
from torch.utils.data import Sampler


class LongestFirst(Sampler[int]):
    """Rows in the order of their tokens, the longest first; equally long ones as they come.

    So a batch has little padding, and too little memory shows in the first one.
    """

    def __init__(self, tokens: list[int]) -> None:
        """Order rows.

        Args:
            tokens: how many each row has.
        """
        self.order = sorted(range(len(tokens)), key=lambda i: -tokens[i])

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def tokens_of(rows: Any) -> list[int] | None:
    """Return how many tokens each row of a data set has, prompt and answers together.

    Returns:
        None: rows are no tokens yet, or labelled answers, whose loss (KTO's) depends on which of
        them share a batch.
    """
    names = getattr(rows, "column_names", None) or ()
    columns = [name for name in names if name.endswith("_ids")]
    if not columns or "label" in names:
        return None
    table = rows.select_columns(columns).with_format("arrow")[:]
    lengths = (pyarrow.compute.list_value_length(table[name]).to_pylist() for name in columns)
    return [sum(tokens or 0 for tokens in row) for row in zip(*lengths, strict=True)]
