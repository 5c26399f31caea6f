"""The order in which held-out rows are evaluated: rows of a batch have about the same length."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow.compute
import pyarrow.types
from torch.utils.data import Sampler

# trainers of conf/algorithm whose loss of a row does not depend on the batch, as that of KTO does
ROW_BY_ROW = frozenset({"SFTTrainer", "DPOTrainer", "RewardTrainer", "Seq2SeqTrainer"})


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


def is_shipped(trainer: Any, names: Collection[str]) -> bool:
    """Return whether a trainer is one of some of conf/algorithm, with nobody else's code in it."""
    classes = type(trainer).__mro__
    modules = {c.__module__.partition(".")[0] for c in classes}
    is_known = modules <= {"lora_exp", "trl", "transformers", *sys.stdlib_module_names}
    return is_known and any(c.__name__ in names for c in classes)


def may_be_ordered(trainer: Any) -> bool:
    """Return whether no result of an evaluation depends on which rows share a batch.

    The balance loss of a mixture of experts and DPO's `aot` losses do; padding-free batches have no
    padding to save, and would be of very different sizes.
    """
    config = trainer.model.config.get_text_config()
    losses = getattr(trainer, "loss_types", None) or ()
    return (
        is_shipped(trainer, ROW_BY_ROW)
        and not getattr(trainer, "padding_free", False)
        and not hasattr(config, "output_router_logits")
        and not any(str(loss).startswith("aot") for loss in losses)
    )


def tokens_of(rows: Any) -> list[int] | None:
    """Return how many tokens each row of a data set has, prompt and answers together.

    Returns:
        None: its rows are no tokens yet.
    """
    names = getattr(rows, "column_names", None) or ()
    columns = [name for name in names if name.endswith("_ids")]
    if not columns:
        return None
    table = rows.select_columns(columns).with_format("arrow")[:]
    is_list = (pyarrow.types.is_list, pyarrow.types.is_large_list)
    lists = [column for column in table.columns if any(check(column.type) for check in is_list)]
    lengths = (pyarrow.compute.list_value_length(column).to_pylist() for column in lists)
    return [sum(tokens or 0 for tokens in row) for row in zip(*lengths, strict=True)] or None
